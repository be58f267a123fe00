"""Everything that is to be seen on a GPU, in one command of minutes: ``make gpu-check``.

`parts` lists what is done, a module each, the most valuable first. `runner` gives each a process
and a time limit, so that none can stop the others; `summary` says how they ended. A part is handed
a `check.Check` and may import tests/ for its hard data.
"""
