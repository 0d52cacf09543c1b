# Written by docs/hints.py: what editors and type checkers read. Nothing of it runs.

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from fedloom.method import Method

class Settings(TypedDict, total=False):
    problem: str
    data: Any
    label: str | None
    exclude: str | Sequence[str]
    keep: str | Sequence[str]
    metadata: str | Sequence[str]
    missing: str
    sep: str | None
    encoding: str | None
    decimal: str | None
    resize: int | str | None
    windows: int | str | None
    group: str | None
    embed: str | None
    partition: str
    clients: int | None
    newcomers: float | str | None
    validation: float
    test_share: float | None
    public: float
    shared_data: float
    model: Any
    head: str | None
    loss: object
    class_weights: str | Sequence[float] | None
    init: str | Path | None
    optimizer: str | None
    schedule: str | None
    cohort: int | None
    participation: str
    availability: str
    speed: float | str
    bandwidth: float | str | None
    latency: float
    step_seconds: float
    server_speed: float | None
    deadline: float | None
    overselect: float
    clock: str
    dropout: float
    lost: float
    attack: object
    faults: str | None
    channel: str | None
    compress: str | None
    dp: str | None
    secure: str | None
    aggregate: str | None
    cache: bool
    buffers: str
    measures: object
    choose_by: str | None
    rounds: int
    patience: int | None
    min_delta: float
    seed: int
    engine: str
    workers: int
    threads: int
    device: str
    eval_every: int
    blind: bool
    max_seconds: float | None
    max_steps: int | None
    max_bytes: int | None
    max_virtual_seconds: float | None
    track: str | None

class Fields(TypedDict, total=False):
    a: float | None
    adapt: int
    adapt_steps: int
    adaptive: bool
    adv: float
    all_train: bool
    alpha: float
    anchors: bool
    averaging: Literal["models", "gradients"]
    b: float
    batch: int
    beside: int
    beta: float | int
    beta1: float | None
    beta2: float
    blend: float
    block: int
    bn: float
    bound: float
    bounds: Sequence[float]
    box: Sequence[float]
    buffer: int
    by_absence: float
    by_diversity: float
    by_fairness: float
    by_loss: float
    c: float
    candidates: int
    chosen: int
    client_rate: float
    clip: float | None
    cluster_epochs: int
    clustering: Literal["hdbscan", "meanshift", "kmeans", "affinity"]
    clusters: int
    common_epochs: int
    communities: int
    coordinated: bool
    cross: bool
    cut: float | str
    cutoff: float | int
    cycle: int
    decay: float
    degree: int | None
    delay: int
    delta: float
    depths: Sequence[int]
    digest_batch: int
    digest_epochs: int
    digest_lr: float
    dynamic: bool
    epochs: int
    eps: float | None
    eps_end: float
    eps_inc: float
    epsilon: float
    eta: float
    every: int
    exits: Sequence[int]
    experts: int
    explore: float
    fading: float
    feature: Literal["update", "model", "distance"]
    features: int
    few_shot: bool
    fewest: int
    filters: int
    fit_epochs: int
    fit_lr: float
    form: Literal["exp", "quad"]
    gamma: float
    gen_batch: int
    gen_lr: float
    gen_steps: int
    gossip: int
    grace: float | int
    graph: Literal["ring", "grid", "exponential", "random", "complete"]
    hard: float
    head_batch: int
    head_epochs: int
    head_lr: float
    headroom: bool
    height: float
    hidden: int
    horizon: int
    inner: Method | int | str | Literal["adamw", "sgd"] | Mapping[str, Any]
    inner_lr: float
    inner_steps: int
    iota: float
    k: int
    kd: float
    kd_lr: float
    kd_steps: int
    l1: float
    l2: float
    lam: float
    lam_last: float
    lam_ref: float
    latest: float
    layers: int
    least: float
    length: int
    levels: Sequence[float]
    looks: int
    lr: float
    lr_decay: float
    masking: bool
    memory: float
    meta_batch: int
    metric: Literal["kl", "l1", "l2", "cosine"]
    mode: Literal["plus", "times"]
    models: str | Sequence[str]
    momentum: float
    most: int
    mu: float
    mu_a: float
    mu_b: float
    neighbours: int
    noise: float | int
    noise_lr: float
    oh: float
    passes: int
    personal_epochs: int
    policy: Literal["static", "ordered", "rolling", "random", "magnitude"]
    pool: int | Literal["all", "cohort"] | Literal["exact", "sketch", "mean"]
    power: float
    pro: bool
    prototypes: int
    public_epochs: int
    public_lr: float
    quantile: float
    ramp: int
    rank: int
    ranks: Sequence[int]
    rates: Literal["estimated", "cohort"]
    refresh: float
    reputation: bool
    restart: bool
    rho: float
    ridge: float
    rows: int
    sample: int
    samples: int
    sampling: Literal["ksas", "entropy", "random"]
    scaler: bool
    score: Literal["lac", "aps"]
    seeds: int
    sensitive: str
    server_batch: int
    server_epochs: int
    server_lr: float | None
    server_rate: float
    share: float
    short: int
    shrink: bool | float
    sigma: float
    sigma0: float
    sizes: Sequence[int]
    sketch: int
    smallest: float | int
    staleness: Literal["constant", "polynomial", "hinge"]
    start: bool | float | int
    start_epochs: int
    step: float
    steps: int
    stragglers: float
    stride: int
    sure: float
    surrogate: bool
    target: int
    tau: float | int
    temperature: float
    test_steps: int
    threshold: float
    tolerance: float
    train: int
    train_lr: float
    turns: int
    unlabelled: float
    unreliable_weight: float
    update: Literal["kcfu", "plain"]
    upsilon: float
    variant: Literal["fo", "hf"] | Literal["masha1", "masha2"] | Literal["swa", "moswa"]
    virtual: int
    warm: bool | float
    warmup: int
    weight: float
    weight_decay: float
    width: int
    window: int
    words: int

class RunSettings(Settings, Fields, total=False): ...

class ComparisonSettings(Settings, total=False):
    fields: Mapping[str, Any]
    seeds: int | str | Sequence[int]
    settings: Mapping[str, Mapping[str, Any]] | Sequence[Mapping[str, Any]]
    tune: int
    ranges: Mapping[str, Any]
    baseline: str | None
    test: str | None
    metric: str | None
    target: float | None
