"""README.md from nbs/index.ipynb.

    python .ci/readme.py            write README.md (and README_files/, where a cell shows a picture)
    python .ci/readme.py --check    only compare; exit 1 and show the difference
    python .ci/readme.py --line 2   print the command that stands below the marker <!-- line 2 -->
"""
import argparse, difflib, posixpath, re, sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import Preprocessor
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
DROP = {"hide", "default_exp", "export", "exporti", "exports"}
ALERTS = {"note": "NOTE", "tip": "TIP", "important": "IMPORTANT", "warning": "WARNING", "caution": "CAUTION"}

def settings():
    "The settings of the project."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini", encoding="utf-8")
    return config["DEFAULT"]

# -- cells ---------------------------------------------------------------------------------------------------------

def directives(source):
    "The `#|` lines at the top of a code cell as a dict, and the code below them."
    lines, found = source.split("\n"), {}
    while lines and re.match(r"\s*#\s*\|", lines[0]):
        key, _, value = lines.pop(0).split("|", 1)[1].strip().partition(" ")
        found[key.rstrip(":")] = value.strip().lower()
    return found, "\n".join(lines)

def without_style(outputs):
    "Take `<style>` blocks out of HTML tables: GitHub would not apply them."
    for o in outputs:
        if "text/html" in o.get("data", {}):
            o["data"]["text/html"] = re.sub(r"<style\b.*?</style>\s*", "", o["data"]["text/html"], flags=re.S)
    return outputs

def code_cell(cell):
    "The cell as a reader should see it by its directives; None where it is hidden."
    found, cell.source = directives(cell.source)
    if DROP & found.keys() or found.get("include") == "false" or "nbdev_export" in cell.source: return None
    cell.outputs = [] if found.get("output") == "false" else without_style(cell.outputs)
    if found.get("echo") == "false": cell.metadata["transient"] = {"remove_source": True}
    return cell if cell.outputs or found.get("echo") != "false" else None

class ForReaders(Preprocessor):
    "Keep what a reader of the README sees, and rewrite Quarto's markup and links for GitHub."
    def preprocess(self, nb, resources):
        nb.metadata["language_info"] = {"name": "python"}
        cells = [code_cell(c) if c.cell_type == "code" else c for c in nb.cells if c.cell_type != "raw"]
        nb.cells = [c for c in cells if c is not None]
        for c in nb.cells:
            if c.cell_type == "markdown": c.source = for_github(c.source)
        return nb, resources

# -- markdown ------------------------------------------------------------------------------------------------------

def outside_code(f, text):
    "Apply `f` to the parts of a markdown text that are not fenced code or code spans."
    parts = re.split(r"(^```.*?^```[^\n]*$|`[^`\n]+`)", text, flags=re.S | re.M)
    return "".join(p if i % 2 else f(p) for i, p in enumerate(parts))

def from_root(target):
    "A link of the notebook as a link of README.md: relative to the root of the repository."
    blob = f"{settings()['git_url']}/blob/{settings()['branch']}/"
    if target.startswith(blob): return target[len(blob):]
    if re.match(r"[a-z]+:|#|/", target): return target
    path, mark, anchor = target.partition("#")
    return posixpath.normpath(posixpath.join(settings()["nbs_path"], path)) + mark + anchor

def links(text):
    "Rewrite the targets of markdown links and images and of `src=` and `href=`."
    text = re.sub(r'(\]\()([^)\s]+)', lambda m: m[1] + from_root(m[2]), text)
    return re.sub(r'\b((?:src|href)=")([^"]+)', lambda m: m[1] + from_root(m[2]), text)

def sized_image(m):
    "A picture with Quarto's attributes as HTML with its width; the other attributes are dropped."
    width = re.search(r'width="?([\w%.]+)', m["attributes"])
    return f'<img src="{m["src"]}" alt="{m["alt"]}" width="{width[1]}">' if width else f'![{m["alt"]}]({m["src"]})'

def alert(m):
    "A Quarto callout as an alert of GitHub."
    title = re.search(r'title="([^"]*)"', m["attributes"])
    head = [f"[!{ALERTS[m['kind']]}]"] + ([f"**{title[1]}**", ""] if title else [])
    return "\n".join("> " + line if line else ">" for line in head + m["body"].strip().split("\n"))

def for_github(text):
    "Markdown of Quarto as markdown of GitHub: links, sized images, callouts, plain divs."
    text = outside_code(links, text)
    text = outside_code(lambda t: re.sub(r"!\[(?P<alt>[^\]]*)\]\((?P<src>[^)\s]+)\)\{(?P<attributes>[^}]*)\}", sized_image, t), text)
    text = re.sub(r"^:::+ *\{\.callout-(?P<kind>\w+)(?P<attributes>[^}]*)\}\n(?P<body>.*?)^:::+ *$", alert, text, flags=re.S | re.M)
    return outside_code(lambda t: re.sub(r"^:::+[^\n]*\n?", "", t, flags=re.M), text)

# -- the file ------------------------------------------------------------------------------------------------------

def render(notebook):
    "The text of README.md and the pictures that it shows, by path."
    config = Config({"ExtractOutputPreprocessor": {"enabled": True}})
    exporter = MarkdownExporter(config=config, preprocessors=[])
    exporter.register_preprocessor(ForReaders, enabled=True)
    exporter._preprocessors.insert(0, exporter._preprocessors.pop())
    nb = nbformat.read(notebook, as_version=4)
    text, resources = exporter.from_notebook_node(nb, resources={"unique_key": "README", "output_files_dir": "README_files"})
    warning = "<!-- Made from nbs/index.ipynb by .ci/readme.py. Edit the notebook. -->\n"
    return warning + "\n" + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", dict(resources["outputs"])

def missing_targets(text):
    "The links of README.md into the repository that lead nowhere."
    found = []
    outside_code(lambda t: found.extend(re.findall(r'(?:\]\(|src="|href=")([^)"\s]+)', t)) or t, text)
    local = [t.partition("#")[0] for t in found if not re.match(r"[a-z]+:|#", t)]
    return sorted({t for t in local if not (ROOT/t).exists()})

def command(text, number):
    "The one command in the code block below the marker `<!-- line NUMBER -->`."
    m = re.search(rf"<!-- line {number} -->\s*```\w*\n(.*?)\n```", text, flags=re.S)
    if not m: sys.exit(f"README.md has no code block below the marker <!-- line {number} -->")
    if "\n" in m[1]: sys.exit(f"line {number} of README.md must be one line, it has {m[1].count(chr(10)) + 1}")
    return m[1]

def differences(files):
    "A line for each made file that differs from the one that is there, with the change in README.md."
    old = (ROOT/"README.md").read_text(encoding="utf-8") if (ROOT/"README.md").exists() else ""
    out = list(difflib.unified_diff(old.splitlines(), files["README.md"].decode().splitlines(), "README.md", "from index.ipynb", lineterm=""))
    there = {f"README_files/{p.name}": p.read_bytes() for p in (ROOT/"README_files").glob("*")}
    pictures = {name: data for name, data in files.items() if name != "README.md"}
    return out + [f"{name} differs" for name in sorted(there.keys() | pictures.keys()) if there.get(name) != pictures.get(name)]

def write(files):
    "Write README.md and its pictures; take away pictures that it no longer shows."
    for old in (ROOT/"README_files").glob("*"): old.unlink()
    for name, data in files.items():
        (ROOT/name).parent.mkdir(exist_ok=True)
        (ROOT/name).write_bytes(data)

def main():
    "See the top of this file."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--line", type=int)
    args = parser.parse_args()
    if args.line: return print(command((ROOT/"README.md").read_text(encoding="utf-8"), args.line))
    text, pictures = render(ROOT/settings()["nbs_path"]/settings()["readme_nb"])
    for number in (1, 2): command(text, number)
    files = {"README.md": text.encode(), **pictures}
    if args.check and (changes := differences(files)): sys.exit("\n".join([*changes, "README.md is not in step with index.ipynb: run python .ci/readme.py"]))
    if not args.check: write(files)
    if missing := missing_targets(text): sys.exit("README.md links to what is not there: " + ", ".join(missing))

if __name__ == "__main__": main()
