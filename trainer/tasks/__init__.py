"""One file a task; its name in a config is the file's name. What a file must hold: tests/contract/test_tasks.py."""
