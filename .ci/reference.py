"""How the reference reads the sources: examples are code, and every name stands in one place."""

import re
from typing import Any

import griffe


class Reference(griffe.Extension):
    """An extension of Griffe, which reads the sources for the site; mkdocs.yml names it."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Call the section `Example:` what Google's style calls it; show types and constants without a description."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
        elif obj.is_attribute and obj.parent and obj.parent.is_module:
            obj.docstring = griffe.Docstring("", parent=obj)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Hide in its own module what the package or a room of it passes on."""
        for room in [pkg, *(member for member in pkg.members.values() if isinstance(member, griffe.Module))]:
            for name in map(str, room.exports or []):
                member = room.members.get(name)
                if isinstance(member, griffe.Alias):
                    defined(pkg, member).public = False


def defined(pkg: griffe.Module, member: griffe.Object | griffe.Alias) -> griffe.Object:
    """What an imported name of the package stands for."""
    while isinstance(member, griffe.Alias):
        member = pkg[member.target_path.removeprefix("ensemblenet.")]
    return member
