"""Snapshots: all that a run needs to go on, in a folder that is whole or is not there.

    OUT/snapshots/step-00000100/
        rank-00000-of-00002.safetensors     the regions of weights, masters and moments that a rank speaks for
        tokenizer/                          so that a model can be made of it alone
        snapshot.json                       the rest: what lies where, and every file's hash; written last

A folder is written beside its place, its bytes are on the disk before it takes its name, and nothing is pickled.
"""
