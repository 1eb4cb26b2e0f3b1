"""The dashboard: what the runs' own folders say, in a browser and in a terminal (terminal.py).

Of a run: run_view.py (followed), metric_rows.py (its metrics by row; by column: trainer/columns.py), curves.py (what is
drawn of one), rank_rows.py and performance.py (its ranks), attention.py, logs.py, run_files.py. Of a store:
store_view.py, overview.py, compare.py, checkpoints.py, data_sets.py, sweeps.py, and resources.py for its targets.

To the browser: app.py puts together who may see what (guard.py), the JSON API (run_api.py, performance_api.py,
step_examples.py), what changes something (actions.py), what is new (stream.py), and the pages (pages.py,
store_pages.py, templates/, static/); server.py serves it.
"""
