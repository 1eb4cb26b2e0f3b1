"""One file a model; its name in a config is the file's name. What a file must hold: tests/contract/test_models.py."""
