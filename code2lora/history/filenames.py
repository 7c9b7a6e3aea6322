"""Names by which files are known: source languages, lock files, vendored and generated files.

Plain data for `rules`. Suffixes are lower case and begin with a dot; folder names are compared
as they are written here.
"""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SOURCE_SUFFIXES = _words(
    """
    .ada .adb .ads .asm .astro .awk .bash .bat .bicep .bzl .c .c++ .cc .cfm .cjs .cl .clj .cljc
    .cljs .cls .cmake .cob .coffee .cpp .cr .cs .css .csx .cu .cuh .cxx .d .dart .dfm .ejs .el
    .elm .erb .erl .ex .exs .f .f03 .f08 .f77 .f90 .f95 .fish .for .fs .fsi .fsx .gd .gleam
    .glsl .go .gql .gradle .graphql .groovy .h .h++ .haml .hbs .hcl .hh .hlsl .hpp .hrl .hs .htm
    .html .hx .hxx .idl .inl .ino .ipp .java .jinja .jinja2 .jl .js .jsx .kt .kts .less .lisp
    .lua .m .mako .metal .mjs .ml .mli .mm .mts .nim .nix .nu .odin .pas .php .pl .pm .postcss
    .pp .prisma .pro .proto .ps1 .psm1 .pug .purs .pxd .py .pyi .pyx .qml .r .rake .rb .rego
    .rkt .robot .rs .s .sas .sass .scala .scm .scss .sh .sol .sql .star .sty .styl .sv .svelte
    .svh .swift .tcl .tf .thrift .tpl .ts .tsx .twig .v .vala .vb .vert .vhd .vhdl .vim .vue
    .wgsl .xsl .xslt .zig .zsh
    """
)

SOURCE_NAMES = _words(
    """
    BUILD BUILD.bazel CMakeLists.txt Containerfile Dockerfile GNUmakefile Gemfile Jenkinsfile
    Justfile Makefile Podfile Procfile Rakefile Snakefile Tiltfile Vagrantfile WORKSPACE
    justfile makefile meson.build wscript
    """
)

LOCK_FILES = _words(
    """
    .terraform.lock.hcl Cargo.lock Gemfile.lock Gopkg.lock Package.resolved Pipfile.lock
    Podfile.lock bun.lock bun.lockb cabal.project.freeze composer.lock conan.lock deno.lock
    flake.lock go.sum gradle.lockfile mix.lock npm-shrinkwrap.json package-lock.json
    packages.lock.json pdm.lock pixi.lock pnpm-lock.yaml poetry.lock pubspec.lock pylock.toml
    rebar.lock uv.lock yarn.lock
    """
)

VENDORED_FOLDERS = _words(
    """
    .bundle .tox .venv .yarn 3rdparty Carthage Godeps Pods _vendor _vendored bower_components
    node_modules site-packages third-party third_party thirdparty vendor vendored vendors venv
    """
)

GENERATED_FOLDERS = _words(
    """
    .mypy_cache .next .nuxt .svelte-kit __generated__ __pycache__ dist htmlcov
    """
)

GENERATED_ENDINGS = tuple(
    _words(
        """
    .designer.cs .freezed.dart .g.cs .g.dart .gen.go .gen.ts .generated.cs .generated.js
    .generated.py .generated.ts .pb.cc .pb.go .pb.gw.go .pb.h .pb.swift _gen.go _generated.go
    _generated.rs _grpc.pb.go _pb.d.ts _pb.js _pb.ts _pb2.py _pb2.pyi _pb2_grpc.py
    """
    )
)

MINIFIED_ENDINGS = tuple(
    _words(
        """
    -min.css -min.js .bundle.js .chunk.js .min.cjs .min.css .min.html .min.js .min.mjs
    .packed.js
    """
    )
)

PAPER_SUFFIXES = _words(
    """
    .md .py .rst
    """
)

PAPER_VENDORED_FOLDERS = _words(
    """
    .git .tox .venv env node_modules venv
    """
)

PAPER_GENERATED_FOLDERS = _words(
    """
    .mypy_cache __pycache__ build dist
    """
)
