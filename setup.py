"""Install the top-level folders as one import package, ``weft``.

The folders keep short names in the checkout (``server/rounds.py``) and get the package's prefix when
installed (``weft.server.rounds``), so nothing called ``server`` or ``common`` lands in anyone's
site-packages. The list of packages is computed: one that is forgotten would work in an editable
install and be missing from the wheel.
"""

from setuptools import find_packages, setup

FOLDERS = {
    "weft.server": "server",
    "weft.client": "client",
    "weft.common": "common",
    "weft.v1": "protos/weft/v1",
}

setup(
    packages=[
        *FOLDERS,
        *(f"{name}.{sub}" for name, folder in FOLDERS.items() for sub in find_packages(folder)),
    ],
    package_dir=FOLDERS,
    package_data={"": ["py.typed", "*.pyi", "*.proto"], "weft.client.demo": ["base/*"]},
)
