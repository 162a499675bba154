# Toolchain file: cross-compiles for 64-bit ARM with GCC and runs what it made under qemu (Debian: g++-aarch64-linux-gnu,
# qemu-user). Debian's cross compiler reads /usr/include too, so packages of headers only are the ones of this machine.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu)
