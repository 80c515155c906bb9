"""`python -m tdds_dist` is `tdds`."""

from tdds_dist.cli import run

if __name__ == "__main__":
    run()
