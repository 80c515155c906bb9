"""Starts stages on a cluster, or on this machine the same way. Nothing in `tdds_dist` knows of it."""
