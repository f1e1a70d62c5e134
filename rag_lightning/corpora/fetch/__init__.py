"""Published data and checkpoints brought to this machine: resumed after a kill, checked, whole or not at all.

``sources`` says what there is, ``download`` fetches a URL, ``hub`` a repository of the hub, ``lock`` keeps the
checksums of what came, ``fetching`` puts them together.
"""
