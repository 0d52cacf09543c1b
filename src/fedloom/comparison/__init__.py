"""Honest comparison: which method on data like mine, and is the difference real?

`grid` and `reading` say what is compared, `run` and `conductor` carry it out in processes (`hands`, `worker`, `job`),
`tuning` searches for hyper-parameters on validation data, `results` reads what came out; `measures` and `statistics`
make of it a judgement.
"""
