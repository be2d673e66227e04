"""Across organisations: the folders that each one installs, and a rehearsal of the whole on one machine.

`flower/` is the app that Flower runs; `templates/` is what `ficpd deploy init` fills in.
"""
