"""Snapshots: the complete state of a run, in a folder that appears only when it is complete.

    OUT/snapshots/step-00000100/
        rank-00000-of-00002.safetensors     regions of weights, fp32 masters and optimizer moments, from one rank
        tokenizer/                          so that `headrace export` needs nothing else
        snapshot.json                       the index of regions, every file's hash and the run's state; written last

A folder is written under another name, and renamed when its bytes are on the disk. Nothing is pickled.
"""
