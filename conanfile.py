import re
from pathlib import Path

from conan import ConanFile
from conan.tools.build import check_min_cppstd
from conan.tools.files import copy
from conan.tools.layout import basic_layout


class KvcullConan(ConanFile):
    name = "kvcull"
    description = "Header-only C++20 library of KV-cache eviction policies"
    license = "Apache-2.0"
    package_type = "header-library"
    settings = "os", "compiler", "build_type", "arch"
    exports_sources = "include/*", "LICENSE"
    no_copy_source = True

    def set_version(self):
        config = (Path(self.recipe_folder) / "include/kvcull/base/config.hpp").read_text()
        self.version = ".".join(re.findall(r"KVCULL_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", config))

    def layout(self):
        basic_layout(self)

    def validate(self):
        check_min_cppstd(self, 20)

    def package(self):
        copy(self, "include/*", self.source_folder, self.package_folder)
        copy(self, "LICENSE", self.source_folder, str(Path(self.package_folder) / "licenses"))

    def package_id(self):
        self.info.clear()

    def package_info(self):
        self.cpp_info.set_property("cmake_target_name", "kvcull::kvcull")
        self.cpp_info.bindirs = []
        self.cpp_info.libdirs = []
