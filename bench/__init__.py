"""The benchmark command line: ``gatematch-bench``, also ``python -m gatematch.bench``."""
