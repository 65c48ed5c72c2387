"""`foreshock collect`: a relay between the ranks of a job and the service, for a node or a cluster.

`gathering.py` and `merging.py` are the pure core, `depot.py` the disk, `upstream.py` the way on,
`relay.py` puts them together, `app.py` is the door.
"""
