"""Sweeps: all jobs are composed and checked before the first starts; one that fails loses no other; a relaunch goes on.

Reading order: ``records`` (what a job's folder says of it), ``job`` (one job as a launcher runs it), ``checks``,
``sweeper`` (plans, launches, sums up), ``grid``, ``search``.
"""
