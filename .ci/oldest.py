"""Print the oldest versions that pyproject.toml allows, as constraints for pip."""

import re
import tomllib
from itertools import chain
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
declared = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
for name, bound in sorted(set(re.findall(r"^([\w-]+)(?:\[\w+\])?>=([\d.]+)", "\n".join(declared), re.MULTILINE))):
    print(f"{name}=={bound if '.' in bound else f'{bound}.0'}.*")
