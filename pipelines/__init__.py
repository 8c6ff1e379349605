"""The Ray programs, one a stage: prepare, precompute, train, evaluate; jobs.py submits them. The only folder that imports Ray."""
