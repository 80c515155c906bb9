"""Measurements that anyone can repeat; `results/` holds what they gave, with hardware, versions and
commit."""
