#!/usr/bin/env bash
# Makes .venv/loops, for the tests of other people's training loops, cleanlab and mlcroissant: their libraries, above the packages of .venv. Safe to run again.
set -euo pipefail
cd "$(dirname "$0")/../../.."
here=.venv/loops
stamp=$here/.installed-$(cat constraints.txt tests/system/loops/install.sh | sha256sum | cut -c1-16)
[ -e "$stamp" ] && exit 0
[ -x $here/bin/python ] || .venv/bin/python -m venv --without-pip $here
packages=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "import site; site.addsitedir('$packages')" >"$(echo $here/lib/python*/site-packages)/above.pth"
.venv/bin/python -m pip --python $here/bin/python install --disable-pip-version-check --no-compile -q -c constraints.txt timm lightning datasets transformers accelerate cleanlab mlcroissant
rm -f $here/.installed-*
touch "$stamp"
