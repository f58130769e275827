"""The pages of the site before rendering.

    python .ci/site.py          process the notebooks into _proc/, as nbdev_docs does, for `quarto render _proc`
    python .ci/site.py FOLDER   and copy _proc to FOLDER for `smalldocs render FOLDER`

Nothing is installed or rendered here. Quarto writes a page where its `output-file` says (nbs/00_core.ipynb becomes
core.html, and the links between functions count on that); smalldocs names a page after its notebook, so its copy has
the notebooks renamed and the links to them changed.
"""
import ast, json, re, shutil, sys
from pathlib import Path

from nbdev.config import get_config
from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
from nbdev.serve import proc_nbs

def lost_prose(cells):
    "The lines that would be missing from a page: nbdev takes the cell with the title for itself and drops all else in it."
    titles = [s for c in cells if c["cell_type"] == "markdown" and re.search(r"^#\s+\S", s := "".join(c["source"]), flags=re.M)]
    return [line for line in titles[0].splitlines() if line.strip() and not re.match(r"#\s|>|- \S+:\s", line)] if titles else []

def mixed_imports(cells):
    "The first lines of cells that import and do more: nbdev would run them whole while it makes the page, without the cells before them."
    tests = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    tests = [s for s in tests if "nbdev_export()" not in s and not re.search(r"^#\|\s*(export|exports|exporti|exec_doc|eval:\s*false)\b|^[%!]", s, flags=re.M)]
    nodes = {s: {type(n) for n in ast.walk(ast.parse(s))} for s in tests}
    return [s.splitlines()[0] for s in tests if nodes[s] & {ast.Import, ast.ImportFrom} and nodes[s] & {ast.Expr, ast.Assign}]

def check_cells(folder):
    "Stop where the cell with a notebook's title holds prose too, a cell imports and does more, or a notebook carries what no reader sees."
    for path in names(folder):
        notebook = json.loads((folder/path).read_text(encoding="utf-8"))
        cells = notebook["cells"]
        if "widgets" in notebook["metadata"]: sys.exit(f"{path}: carries the state of progress bars; take `widgets` out of its metadata")
        for line in lost_prose(cells): sys.exit(f"{path}: this stands in the cell with the title and would not be on the page; give it a cell of its own: {line!r}")
        for line in mixed_imports(cells): sys.exit(f"{path}: the cell that begins with {line!r} imports and does more; give the imports a cell of their own")

def process():
    "Write nbdev.yml and sidebar.yml, and the processed notebooks; return their folder."
    check_cells(get_config().nbs_path)
    refresh_quarto_yml()
    nbdev_sidebar.__wrapped__()
    try: cache = proc_nbs(n_workers=2, force=True)
    except Exception as e: sys.exit(f"{e}\nThe pages are made from the exported cells and the cells with imports alone.")
    unprocessed = [p for p in names(get_config().nbs_path) if not (cache/p).exists()]
    if unprocessed: sys.exit(f"not processed: {', '.join(map(str, unprocessed))}")
    return cache

def names(folder):
    "The notebooks in a folder, without hidden ones, relative to it."
    found = (p.relative_to(folder) for p in sorted(Path(folder).rglob("*.ipynb")))
    return [p for p in found if not any(part[0] in "._" for part in p.parts)]

def page_name(name):
    "The notebook's name after its page: without the number in front, as nbdev names pages."
    return re.sub(r"^\d+[a-zA-Z0-9]*_", "", name.lower())

def renamed_links(text, known):
    "The text with the links to the notebooks in `known` (file names) changed to their new names."
    return re.sub(r"[\w.-]+\.ipynb", lambda m: page_name(m[0]) if m[0] in known else m[0], text)

def stage(cache, folder):
    "A copy of the processed notebooks for a renderer that names pages after notebooks."
    shutil.copytree(cache, folder, ignore=shutil.ignore_patterns("_docs", ".quarto"))
    notebooks = names(folder)
    known = {p.name for p in notebooks}
    for path in notebooks:
        nb = json.loads((folder/path).read_text(encoding="utf-8"))
        for cell in nb["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown": cell["source"] = renamed_links(source, known)
            for shown in (o["data"] for o in cell.get("outputs", []) if "text/markdown" in o.get("data", {})): shown["text/markdown"] = renamed_links("".join(shown["text/markdown"]), known)
            if cell["cell_type"] == "raw": cell["source"] = re.sub(r"^output-file:.*\n", "", source, flags=re.M)
        (folder/path).unlink()
        (folder/path).with_name(page_name(path.name)).write_text(json.dumps(nb), encoding="utf-8")
    for path in folder.glob("*.yml"): path.write_text(renamed_links(path.read_text(encoding="utf-8"), known), encoding="utf-8")

if __name__ == "__main__":
    cache = process()
    if len(sys.argv) > 1: stage(cache, Path(sys.argv[1]))
