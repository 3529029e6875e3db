"""Run folders: names of their files, data sets of a run, events, and snapshots of launches."""
