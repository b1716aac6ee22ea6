"""Measurements, predictions, experiments, the audit, the planner and the store.

`measure` runs arms beside each other and `records` says what such a run leaves behind; nearly everything else starts from records.
`scoring` reads texts with a model in one teacher-forced pass, `store` keeps runs, `statistics` turns numbers into intervals and
evidence, `html` draws pages. Above them stand `bench`, `planning`, `experiments` and `audit`, which know nothing of each other.
"""
