"""The dashboard: what the runs' own folders say, in a browser (server.py) and in a terminal (terminal.py).

columns.py  a run's metrics by column, kept in a cache of this machine     curves.py  what is drawn of a metric
"""
