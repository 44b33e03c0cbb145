"""Sphinx: how `make docs` makes the site of these pages."""

from __future__ import annotations

import celery_etcd_lock

project = "celery-etcd-lock"
author = "the authors of celery-etcd-lock"
release = version = celery_etcd_lock.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]

exclude_patterns = ["_build"]
nitpicky = False

# Markdown, as GitHub shows it too: links to files and headings work in both places.
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

# Docstrings are prose with code in single backticks; types stand in the signature.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"


html_theme = "furo"
html_title = f"celery-etcd-lock {release}"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["static"]
html_css_files = ["site.css"]
