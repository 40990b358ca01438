"""The primitives of packing, compiled: in C for CPUs.

`packing` has the torch code that defines each of them and runs anywhere; it comes here where a compiled one can take
its place. Nothing here knows of layouts, autograd or modules.
"""
