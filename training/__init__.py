"""Trains small LiveAct models in the released checkpoint layout. Not in the wheel.

Reading order: `data` (a cartoon that talks, generated), `vae`, `speech` and `dit` (the three
networks that are trained, each a model and its training), `checkpoint` (the files). `run` has what
every training shares, `stages` the order of the work, `__main__` the command line.
"""
