"""The grid of `experiments` as jobs: on a SLURM cluster, or on this machine the same way. Owns
sbatch texts, what becomes of a job that ends, and `tdds submit`, `status` and `logs`. May import
`tdds_dist.cli` and below; only `tdds_dist.__main__` imports it. Start with `submit`, then `task`:
what runs in a job.
"""
