"""The dashboard: what the runs' own folders say, in a browser and in a terminal.

columns.py  a run's metrics by column, in a cache of this machine     curves.py  what is drawn of a metric
runs.py     the runs of a store, followed                             stream.py  what is new, as server-sent events
app.py      the JSON API                                              pages.py   HTML (templates/, static/)
guard.py    who may see and do what
"""
