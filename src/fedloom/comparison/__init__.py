"""Honest comparison: which method on data like mine, and is the difference real?

`grid` and `reading` say what is compared; `run` and `scheduler` carry it out through `executors` (`worker`, `job`,
`forks`); `tuning` searches for hyper-parameters on validation data and `trials` keeps what it found; `results` reads
what came out, `layout` knows where it lies; `measures`, `statistics` and `table` make of it a judgement.
"""
