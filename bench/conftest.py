"""``pytest bench`` runs the regression suites; everything else here is a script."""

collect_ignore_glob = ["[!t]*.py", "ta*.py", "ti*.py"]
