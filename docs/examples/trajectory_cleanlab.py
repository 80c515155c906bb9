"""Find labels that are perhaps wrong: cleanlab's label quality from what the network said in its last epochs."""

import sys

import numpy as np
import pandas as pd
from cleanlab.rank import find_top_issues, get_label_quality_scores


def label_quality(table: str, from_epoch: int) -> pd.Series:
    """cleanlab's self-confidence of each label from an epoch on, by global index; the lowest are perhaps wrong. `table` is
    trajectory.parquet of `tdds export RUN --format trajectory`. That score looks at p_label alone, so two classes do:
    another one, and its own."""
    rows = pd.read_parquet(table, columns=["index", "p_label"], filters=[("epoch", ">=", from_epoch)])
    p_label = rows.groupby("index")["p_label"].mean()
    own = np.ones(len(p_label), dtype=int)
    quality = get_label_quality_scores(own, np.column_stack([1 - p_label, p_label]), method="self_confidence")
    return pd.Series(quality, p_label.index)


if __name__ == "__main__":
    quality = label_quality(sys.argv[1], int(sys.argv[2]))
    print(quality.loc[find_top_issues(quality.to_numpy(), top=10)].to_string())
