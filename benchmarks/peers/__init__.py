"""One module a loader, all with the same shape, so that benchmarks/loaders.py can run them in turn.

SETTINGS                    what was chosen, for the reader of the results
write(case, folder)         store the case's rows in the loader's own format
Peer(case, folder, ...)     see interface.py
"""
