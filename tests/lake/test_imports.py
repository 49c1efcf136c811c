import subprocess
import sys


def test_arrow_becomes_numpy_without_pandas_and_pandas_is_still_found():
    code = (
        "import sys; from lakebed.lake.imports import leave_pandas_alone; leave_pandas_alone(); import pyarrow as pa;"
        "table = pa.table({'a': [1, 2]}); table['a'].to_numpy(); print('pandas' in sys.modules);"
        "from importlib.util import find_spec; print(find_spec('pandas') is None or len(table.to_pandas()) == 2)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "True"]
