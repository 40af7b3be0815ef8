"""The processes of a run: what they say to each other, and who is missing.

Every process holds the whole forest of an iteration, which is small beside the models: rewards, credit, weights,
filters and metrics are computed on all of it, so they are those of one process. Dealt out are the calls of models:
sampling, judging, scoring, and the passes of an update.
"""
