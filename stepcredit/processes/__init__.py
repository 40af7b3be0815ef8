"""The processes of a run: their communication, and which of them are missing.

Every process holds the whole forest of an iteration, which is small beside the models: rewards, credit, weights,
filters and metrics are computed on all of it, so they are those of one process. The calls of models are distributed
over the processes: sampling, judging, scoring, and the forward and backward passes of an update.
"""
