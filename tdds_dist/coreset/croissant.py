"""The text of croissant.json: an exported trajectory as Croissant 1.0 describes datasets
(https://docs.mlcommons.org/croissant/docs/croissant-spec.html), which is JSON-LD.

What only the publisher knows is left to them: `license`, `url`, `creator`, `datePublished`.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from tdds_dist.runs.artifacts import Fingerprint

# the specification's own terms; a context that lacks any is called not standard
_TERMS = (
    "citeAs column data dataType equivalentProperty examples extract field fileObject fileProperty"
    " fileSet format includes isLiveDataset jsonPath key md5 parentField path recordSet references"
    " regex repeated replace samplingRate separator source subField transform"
)
_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "dct": "http://purl.org/dc/terms/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    **{term: f"cr:{term}" for term in _TERMS.split()},
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
}
_TYPES = {"int64": "sc:Integer", "bool": "sc:Boolean"}  # others are numbers
_COLUMNS = {
    "epoch": "number of the epoch, from 0",
    "index": "row of the sample in the dataset, from 0",
    "label": "class of the sample in training",
    "delta_official": "sum over classes of |p' (log(p' + 1e-8) - log(p + 1e-8))|; p: probabilities"
    " of the epoch before, p': of this one",
    "delta_paper": "sum over classes of p' log(p' / p)",
    "delta_ce": "log(p'_y / p_y); y: the label",
    "p_label": "p'_y, the probability of the label",
    "logit_margin": "logit of the label minus the largest other",
    "p_margin": "probability of the label minus the largest other",
    "entropy": "entropy of p', natural logarithm",
    "el2n": "Euclidean norm of p' - onehot(y)",
    "correct": "1 where the label has the largest logit, else 0",
    "visited": "1 where the sample was visited in the epoch; 0: numbers of its last visit",
    "quarantined": "whether the sample gave NaN or infinite logits in any epoch; its numbers from"
    " then on are 0",
}


def croissant_text(
    name: str,
    table: Path,
    sha256: str,
    types: Mapping[str, str],
    num_epochs: int,
    found: Fingerprint,
) -> str:
    """Return the description of `table`, which lies beside it and has this sha256; `types` are the
    Parquet types of its columns."""
    fields = [
        {
            "@type": "cr:Field",
            "@id": f"rows/{column}",
            "name": column,
            "description": _COLUMNS[column],
            "dataType": _TYPES.get(kind, "sc:Float"),
            "source": {"fileObject": {"@id": table.name}, "extract": {"column": column}},
        }
        for column, kind in types.items()
    ]
    rows = {
        "@type": "cr:RecordSet",
        "@id": "rows",
        "name": "rows",
        "description": "one row per epoch and sample, sorted by both",
        "key": [{"@id": "rows/epoch"}, {"@id": "rows/index"}],
        "field": fields,
    }
    file = {
        "@type": "cr:FileObject",
        "@id": table.name,
        "name": table.name,
        "contentUrl": table.name,
        "contentSize": f"{table.stat().st_size} B",
        "encodingFormat": "application/x-parquet",
        "sha256": sha256,
    }
    text = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": f"trajectory of {name}",
        "description": f"What a network said of each of {found.num_samples} training samples of"
        f" {found.num_classes} classes in each of {num_epochs} epochs, as a few numbers that"
        " pruning scores are made of. Recorded by tdds_dist; the samples are not here. SHA-256 of"
        f" the labels (int64, little-endian, by index): {found.labels_sha256}.",
        "distribution": [file],
        "recordSet": [rows],
    }
    return json.dumps(text, indent=1) + "\n"
