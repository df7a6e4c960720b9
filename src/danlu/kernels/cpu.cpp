// Whether this CPU, and the system on it, have the instruction set that this library is for; compiled without it.
#if defined(DANLU_AMX)
#include <sys/syscall.h>
#include <unistd.h>

// Linux gives the tile registers, 8 KiB a thread, to a process that asks (Documentation/arch/x86/xstate.rst).
static bool may_use_tiles() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool granted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return granted;
}
#endif

extern "C" __attribute__((visibility("default"))) int danlu_works() {
    __builtin_cpu_init();
    bool works = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#if defined(DANLU_AVX512) || defined(DANLU_AVX512_BF16) || defined(DANLU_AMX)
    works = works && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512vnni");
#endif
#if defined(DANLU_AVX512_BF16) || defined(DANLU_AMX)
    works = works && __builtin_cpu_supports("avx512bf16");
#endif
#if defined(DANLU_AMX)
    works = works && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && may_use_tiles();
#endif
    return works;
}
