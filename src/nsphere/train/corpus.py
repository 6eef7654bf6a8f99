"""The embedded text: Python's own standard library, as source, read from the running interpreter.

The list below is explicit, so that the corpus does not depend on what else was installed beside it. It names
the modules whose source every CPython from 3.10 to 3.14 ships, also where a distribution splits the library
into
packages: no tests, no idlelib, tkinter, turtle, lib2to3, ensurepip, venv or distutils, nothing that 3.12 or
3.13 removed, no tables that a script generated (code pages, stringprep, pydoc topics, sysconfig data), no
stubs of a line or two. A module may be a file or a package (`pathlib` became one); its text is that of the
file or of `__init__.py`.

The text differs between Python versions and a little between distributions; the corpus's sha256 tells them
apart.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

_TRAIN = """
    __future__ _collections_abc _compat_pickle _markupbase _osx_support _py_abc _pydecimal _pyio
    _sitebuiltins _threading_local _weakrefset abc argparse ast asyncio asyncio.__main__
    asyncio.base_events asyncio.base_futures asyncio.base_subprocess asyncio.base_tasks
    asyncio.constants asyncio.coroutines asyncio.events asyncio.exceptions asyncio.format_helpers
    asyncio.futures asyncio.locks asyncio.mixins asyncio.proactor_events asyncio.protocols
    asyncio.queues asyncio.runners asyncio.selector_events asyncio.sslproto asyncio.staggered
    asyncio.subprocess asyncio.tasks asyncio.threads asyncio.transports asyncio.trsock
    asyncio.unix_events asyncio.windows_events asyncio.windows_utils base64 bdb bisect bz2 cProfile code
    codecs codeop collections colorsys compileall concurrent.futures concurrent.futures._base
    concurrent.futures.process concurrent.futures.thread configparser contextlib copy copyreg csv ctypes
    ctypes._aix ctypes._endian ctypes.util ctypes.wintypes curses curses.ascii curses.has_key
    dataclasses datetime dbm dbm.dumb decimal difflib dis doctest email email._encoded_words
    email._header_value_parser email._parseaddr email._policybase email.base64mime email.charset
    email.contentmanager email.encoders email.errors email.feedparser email.generator email.header
    email.iterators email.message email.mime.application email.mime.audio email.mime.base
    email.mime.image email.mime.message email.mime.multipart email.mime.nonmultipart email.mime.text
    email.parser email.policy email.quoprimime email.utils encodings encodings.base64_codec
    encodings.bz2_codec encodings.charmap encodings.hex_codec encodings.idna encodings.punycode
    encodings.quopri_codec encodings.rot_13 encodings.utf_16 encodings.utf_32 encodings.utf_8_sig
    encodings.uu_codec encodings.zlib_codec enum filecmp fileinput fnmatch ftplib functools genericpath
    getopt getpass gettext glob gzip hashlib heapq hmac html html.parser http http.client http.cookiejar
    http.server imaplib importlib importlib._abc importlib._bootstrap importlib._bootstrap_external
    importlib.abc importlib.machinery importlib.metadata importlib.metadata._adapters
    importlib.metadata._collections importlib.metadata._functools importlib.metadata._itertools
    importlib.metadata._meta importlib.metadata._text importlib.readers importlib.resources inspect io
    ipaddress json json.encoder json.scanner json.tool linecache logging logging.handlers lzma mailbox
    mimetypes modulefinder multiprocessing multiprocessing.connection multiprocessing.context
    multiprocessing.dummy multiprocessing.dummy.connection multiprocessing.forkserver
    multiprocessing.managers multiprocessing.pool multiprocessing.popen_fork
    multiprocessing.popen_forkserver multiprocessing.popen_spawn_posix multiprocessing.popen_spawn_win32
    multiprocessing.process multiprocessing.queues multiprocessing.reduction
    multiprocessing.resource_sharer multiprocessing.resource_tracker multiprocessing.shared_memory
    multiprocessing.sharedctypes multiprocessing.spawn multiprocessing.synchronize multiprocessing.util
    ntpath nturl2path numbers opcode operator optparse os pathlib pdb pickle pickletools pkgutil
    platform plistlib poplib posixpath pprint profile pstats pty py_compile pydoc queue quopri random re
    reprlib rlcompleter runpy secrets selectors shelve shutil signal smtplib socket socketserver sqlite3
    sqlite3.dbapi2 ssl stat statistics string struct subprocess symtable sysconfig tabnanny tarfile
    tempfile threading tokenize trace traceback tracemalloc tty types typing unittest unittest.__main__
    unittest._log unittest.async_case unittest.case unittest.loader unittest.main unittest.mock
    unittest.result unittest.runner unittest.signals unittest.util urllib.error urllib.parse
    urllib.request urllib.response uuid warnings wave weakref webbrowser wsgiref wsgiref.handlers
    wsgiref.headers wsgiref.simple_server wsgiref.util xml xml.dom xml.dom.NodeFilter xml.dom.domreg
    xml.dom.expatbuilder xml.dom.minicompat xml.dom.minidom xml.dom.pulldom xml.dom.xmlbuilder xml.etree
    xml.etree.ElementInclude xml.etree.ElementPath xml.etree.ElementTree xml.parsers xml.parsers.expat
    xml.sax xml.sax._exceptions xml.sax.expatreader xml.sax.handler xml.sax.xmlreader xmlrpc.client
    xmlrpc.server zipfile zipimport zoneinfo zoneinfo._common zoneinfo._tzpath zoneinfo._zoneinfo
"""

# About 5% of the bytes, whole files, from every corner of the library: text tools, numbers, asyncio, mail,
# web, processes, XML, databases. Their near-copies (profile and cProfile, ntpath and posixpath) all stay in
# training.
_VAL = """
    _strptime asyncio.streams calendar cmd curses.textpad email.headerregistry fractions graphlib
    http.cookies importlib.util json.decoder logging.config multiprocessing.heap netrc pyclbr sched
    shlex sqlite3.dump textwrap timeit unittest.suite urllib.robotparser wsgiref.validate
    xml.sax.saxutils zipapp
"""

TRAIN_MODULES = tuple(_TRAIN.split())
VAL_MODULES = tuple(_VAL.split())


def read_stdlib(root: Path | None = None) -> tuple[list[str], list[str]]:
    """Read the embedded corpus.

    Args:
        root: Folder of the standard library; by default the running interpreter's.

    Returns:
        The training and the validation documents, one per module, in the order of the lists. Line ends are
        line feeds.

    Raises:
        ValueError: If a module's source is missing or is not UTF-8.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    return [_source(root, name) for name in TRAIN_MODULES], [_source(root, name) for name in VAL_MODULES]


def _source(root: Path, module: str) -> str:
    stem = root.joinpath(*module.split("."))
    for path in (stem.with_suffix(".py"), stem / "__init__.py"):
        if path.is_file():
            # An installer on Windows writes "\r\n"; the corpus is the same text everywhere.
            return path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    raise ValueError(
        f"the embedded corpus needs the source of Python's module {module!r}, which {root} lacks; install "
        f"the whole standard library (on Debian: apt install libpython3-stdlib) or give your own data"
    )
