"""Our templates, into which all that comes from runs and data is escaped."""

import jinja2


def template(name: str) -> jinja2.Template:
    """A file of html/ to fill in; what it names must be given."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("mmpre.report", "html"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    ).get_template(name)  # fmt: skip
