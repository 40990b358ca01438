"""Seeded random programs, each run dense and with razor, and compared.

A program is a small PyTorch script: a few module classes, what is done to them before and after `get_razor_model`, and
how they are trained. It is drawn from a grammar (`grammar_layers.py`, `grammar_calls.py`), put together in
`generate.py`, and written out as plain code (`program.py`), so that a failure can be read and run by itself.
`compare.py` says what counts as a difference, `shrink.py` drops what a failure does not need, and `__main__.py` is the
command:

    python -m tests.random_programs --seed 17                      # one program, and where it differs
    python -m tests.random_programs --programs 20000 --processes 2 # many, with a summary
"""
