"""Trainings and array jobs on clusters: the scripts of `launch/`, filled in and submitted; checks before a start."""
