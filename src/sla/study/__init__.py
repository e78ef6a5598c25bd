"""The study: the paper's claims at a scale that one GPU measures in hours.

    plan        one YAML: arms, the questions they answer, seeds, measures
    runner      what is missing of them, one (arm, seed) after the other, resumable
    callbacks   what a run does at the steps of its curve
    measure     losses of fixed triples, attention errors, densities, FLOPs
    videos      samples of held-out prompts, scored against full attention's
    labels      attributes of clips; held-out prompts
    evaluator   a classifier of the attributes that we train: accuracy, and features for a distance
    records     rows under results/study, and which of them count
    statistics  means, paired bootstrap intervals, spread over seeds
    parts       a weights file in parts that travel

`records` and `statistics` need no torch: tables are made of them (`sla.figures.study`).
"""
