"""The tools of the gate find what they are there to find."""
import importlib.util, subprocess, sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

@cache
def tool(name):
    "A script of .ci as a module."
    spec = importlib.util.spec_from_file_location(name, ROOT/".ci"/f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

# -- the site ------------------------------------------------------------------------------------------------------

@pytest.fixture
def site(tmp_path):
    "A site of two pages without a fault."
    (tmp_path/"sub").mkdir()
    (tmp_path/"plot.png").write_bytes(b"png")
    (tmp_path/"index.html").write_text("""<h1 id="top">Home</h1> <a href="#top">up</a> <a href="sub/">below</a>
        <a href="https://elsewhere.example/none.html">away</a> <a href="https://us.example/x/sub/index.html#part">own</a>
        <img src="plot.png"> <img src="data:image/png;base64,AAAA"> <a href="mailto:a@b.example">write</a>""")
    (tmp_path/"sub/index.html").write_text('<h2 id="part">Part</h2> <a href="../index.html#top">home</a> <img src="../plot.png">')
    return tmp_path

def faults(site): return tool("check_site").check(site, "https://us.example/x")[0]

def test_a_sound_site_has_no_fault(site):
    assert tool("check_site").check(site, "https://us.example/x") == ([], 2, 9, 3)

@pytest.mark.parametrize("broken, says", [
    ('<a href="gone.html">x</a>', "gone.html is not there"),
    ('<a href="sub/index.html#nowhere">x</a>', "no such place"),
    ('<a href="#nowhere">x</a>', "no such place"),
    ('<a href="https://us.example/x/gone.html#f">x</a>', "gone.html#f is not there"),
    ('<a href="../outside.html">x</a>', "out of the site"),
    ('<img src="images/gone.png">', "images/gone.png is not there"),
    ('<img alt="no source">', "an image without a source"),
    ('<link rel="stylesheet" href="gone.css">', "gone.css is not there"),
    ('<script src="gone.js"></script>', "gone.js is not there")])
def test_each_fault_is_found(site, broken, says):
    page = site/"index.html"
    page.write_text(page.read_text() + "\n" + broken)
    assert len(faults(site)) == 1 and says in faults(site)[0] and faults(site)[0].startswith("index.html:4:")

def test_a_faulty_or_empty_site_fails(site, tmp_path):
    run = lambda folder: subprocess.run([sys.executable, ROOT/".ci/check_site.py", folder], capture_output=True, text=True)
    assert run(site).returncode == 0
    (site/"plot.png").unlink()
    assert run(site).returncode == 1 and "plot.png is not there" in run(site).stdout
    (tmp_path/"none").mkdir()
    assert run(tmp_path/"none").returncode == 1

# -- the README ----------------------------------------------------------------------------------------------------

def test_links_become_relative_to_the_repository():
    for_github = tool("readme").for_github
    assert for_github("[a](01_data.ipynb#mix) [b](#here) [c](https://x.example/01_data.ipynb)") == \
        "[a](nbs/01_data.ipynb#mix) [b](#here) [c](https://x.example/01_data.ipynb)"
    assert for_github("![curve](images/curve.png)") == "![curve](nbs/images/curve.png)"
    assert for_github("![curve](images/curve.png){width=60% fig-align=left}") == '<img src="nbs/images/curve.png" alt="curve" width="60%">'
    assert for_github('<img src="images/curve.png">') == '<img src="nbs/images/curve.png">'
    blob = f"{tool('readme').settings()['git_url']}/blob/main/"
    assert for_github(f"[licence]({blob}LICENSE)") == "[licence](LICENSE)"

def test_code_is_left_alone():
    code = "`f[i](x.py)`\n\n```python\ng[i](x)\n::: not a div\n```\n"
    assert tool("readme").for_github(code) == code

def test_callouts_become_alerts_and_divs_go():
    text = '::: {.callout-note title="Departure"}\nOne.\n\nTwo: [d](01_data.ipynb).\n:::\n\n::: {.column-page}\nwide\n:::\n'
    assert tool("readme").for_github(text) == \
        "> [!NOTE]\n> **Departure**\n>\n> One.\n>\n> Two: [d](nbs/01_data.ipynb).\n\nwide\n"

def notebook(tmp_path, *cells):
    "A notebook file of the given cells."
    import nbformat
    nb = nbformat.v4.new_notebook(cells=list(cells))
    nbformat.write(nb, tmp_path/"index.ipynb")
    return tmp_path/"index.ipynb"

def test_only_what_a_reader_should_see_is_shown(tmp_path):
    from nbformat.v4 import new_code_cell as code, new_markdown_cell as markdown, new_output as output
    table = output("display_data", data={"text/html": "<style scoped>td {}</style><table><tr><td>7</td></tr></table>"})
    picture = output("display_data", data={"image/png": "aGVsbG8="})
    text, pictures = tool("readme").render(notebook(tmp_path, markdown("# Title"), code("#| hide\nsecret = 1"),
        code("#| default_exp core"), code("#| export\ndef f(): pass"), code("#| echo: false\nquiet()", outputs=[table]),
        code("import nbdev; nbdev.nbdev_export()"), code("#| gpu\nshown()", outputs=[picture]), code("#| output: false\nbare()", outputs=[table])))
    for hidden in ("secret", "default_exp", "def f", "quiet", "nbdev_export", "<style", "#|"): assert hidden not in text
    assert text.count("<td>7</td>") == 1 and "```python\nshown()\n```" in text and "```python\nbare()\n```" in text
    (name, data), = pictures.items()
    assert data == b"hello" and name.startswith("README_files/") and f"]({name})" in text

def test_a_line_to_copy_is_one_line():
    command = tool("readme").command
    assert command("x\n<!-- line 2 -->\n```bash\npytest -q\n```\n", 2) == "pytest -q"
    for text in ("no marker", "<!-- line 2 -->\n```bash\na\nb\n```\n"):
        with pytest.raises(SystemExit, match="line 2"): command(text, 2)

# -- the pages -----------------------------------------------------------------------------------------------------

def test_a_copy_for_smalldocs_has_pages_under_their_public_names(tmp_path):
    import json
    cache, out = tmp_path/"_proc", tmp_path/"out"
    (cache/"experiments").mkdir(parents=True)
    cells = [{"cell_type": "markdown", "source": "[core](../00_core.ipynb#opt) [other](https://x.example/77_other.ipynb)"},
             {"cell_type": "code", "source": "table", "outputs": [{"output_type": "display_data", "data": {"text/markdown": "| [c](../00_core.ipynb) |"}}]}]
    front = {"cell_type": "raw", "source": "---\noutput-file: core.html\ntitle: core\n---\n"}
    (cache/"00_core.ipynb").write_text(json.dumps({"cells": [front]}))
    (cache/"experiments/01_best.ipynb").write_text(json.dumps({"cells": cells}))
    (cache/"sidebar.yml").write_text("- 00_core.ipynb\n- experiments/01_best.ipynb\n")
    tool("site").stage(cache, out)
    assert tool("site").names(out) == [Path("core.ipynb"), Path("experiments/best.ipynb")]
    assert json.loads((out/"core.ipynb").read_text())["cells"][0]["source"] == "---\ntitle: core\n---\n"
    assert "| [c](../core.ipynb) |" in (out/"experiments/best.ipynb").read_text()
    assert "(../core.ipynb#opt) [other](https://x.example/77_other.ipynb)" in (out/"experiments/best.ipynb").read_text()
    assert (out/"sidebar.yml").read_text() == "- core.ipynb\n- experiments/best.ipynb\n"

def test_prose_beside_a_title_is_found():
    cell = lambda text: {"cell_type": "markdown", "source": text}
    lost = tool("site").lost_prose
    assert lost([cell("# Title\n> subtitle\n\n- order: 3\n"), cell("Prose.\n# Another\nmore")]) == []
    assert lost([cell("# Title\n> subtitle\n\nProse that would be lost.")]) == ["Prose that would be lost."]

def test_imports_beside_other_code_are_found():
    cell = lambda text: {"cell_type": "code", "source": text}
    mixed = tool("site").mixed_imports
    assert mixed([cell("#| export\nimport re\nx = 1"), cell("import re"), cell("x = 1"), cell("#| eval: false\nimport re\nx = 1"), cell('w = "import re"')]) == []
    assert mixed([cell("import re\nx = 1"), cell("def f():\n    import re\n    return re.escape('.')"), cell("def f():\n    import re\n    f()")]) == ["import re", "def f():"]

def test_progress_bars_left_behind_are_found(tmp_path):
    notebook(tmp_path).write_text('{"cells": [], "metadata": {"widgets": {}}, "nbformat": 4, "nbformat_minor": 5}')
    with pytest.raises(SystemExit, match="state of progress bars"): tool("site").check_cells(tmp_path)

def test_every_notebook_has_its_whole_page():
    tool("site").check_cells(ROOT/"nbs")
