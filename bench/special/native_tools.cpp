// What the special rows need and Python can't do: hold the GIL for a stated time, release layers from a
// thread that has no Python, and find out how long a call held the GIL. Built by
// bench/special/native_tools.py, loaded with ctypes.
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <pthread.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstring>

namespace {

int64_t now_ns() {
    timespec t{};
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

void sleep_until(int64_t deadline_ns) {
    const timespec t{deadline_ns / 1000000000LL, deadline_ns % 1000000000LL};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, nullptr) != 0) {
    }
}

// --- a producer that releases layers through the progress word
// ---------------------------------------------------

struct Producer {
    uint64_t* word;
    int64_t layers;
    int64_t interval_ns;
    int64_t* stamps_ns;
    pthread_t thread;
};

Producer producer;

void* produce(void*) {
    int64_t next = now_ns();
    for (int64_t n = 1; n <= producer.layers; ++n) {
        next += producer.interval_ns;
        sleep_until(next);
        producer.stamps_ns[n - 1] = now_ns();
        std::atomic_ref<uint64_t>(*producer.word).store(static_cast<uint64_t>(n), std::memory_order_release);
    }
    return nullptr;
}

// --- how long is the GIL released inside a call?
// -----------------------------------------------------------------
//
// The extension calls PyEval_SaveThread and PyEval_RestoreThread through its global offset table. Both
// entries are replaced by functions that note the time and call the real ones.

using SaveThread = void* (*)();
using RestoreThread = void (*)(void*);

SaveThread real_save = nullptr;
RestoreThread real_restore = nullptr;
thread_local int64_t released_at_ns = 0;
thread_local int64_t released_ns = 0;

void* noted_save() {
    void* state = real_save();
    released_at_ns = now_ns();
    return state;
}

void noted_restore(void* state) {
    real_restore(state);
    released_ns += now_ns() - released_at_ns;
}

struct Search {
    const char* library;
    int replaced;
};

void replace(ElfW(Addr) base, const ElfW(Rela) & entry, const char* symbol, int* replaced) {
    void* with = nullptr;
    if (std::strcmp(symbol, "PyEval_SaveThread") == 0) with = reinterpret_cast<void*>(&noted_save);
    if (std::strcmp(symbol, "PyEval_RestoreThread") == 0) with = reinterpret_cast<void*>(&noted_restore);
    if (with == nullptr) return;
    auto* slot = reinterpret_cast<void**>(base + entry.r_offset);
    const auto page_size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    auto* page = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(slot) & ~(page_size - 1));
    if (mprotect(page, page_size, PROT_READ | PROT_WRITE) != 0) return;  // RELRO made it read-only
    *slot = with;
    ++*replaced;
}

struct Tables {
    const ElfW(Sym) * symbols = nullptr;
    const char* strings = nullptr;
    const ElfW(Rela) * lists[2] = {nullptr, nullptr};  // of the procedure table, of the data
    size_t sizes[2] = {0, 0};
};

Tables tables_of(const ElfW(Dyn) * entry) {
    Tables tables;
    for (; entry->d_tag != DT_NULL; ++entry) {
        const auto at = entry->d_un.d_ptr;
        if (entry->d_tag == DT_SYMTAB) tables.symbols = reinterpret_cast<const ElfW(Sym)*>(at);
        if (entry->d_tag == DT_STRTAB) tables.strings = reinterpret_cast<const char*>(at);
        if (entry->d_tag == DT_JMPREL) tables.lists[0] = reinterpret_cast<const ElfW(Rela)*>(at);
        if (entry->d_tag == DT_PLTRELSZ) tables.sizes[0] = entry->d_un.d_val;
        if (entry->d_tag == DT_RELA) tables.lists[1] = reinterpret_cast<const ElfW(Rela)*>(at);
        if (entry->d_tag == DT_RELASZ) tables.sizes[1] = entry->d_un.d_val;
    }
    return tables;
}

int visit(dl_phdr_info* info, size_t, void* data) {
    auto* search = static_cast<Search*>(data);
    if (std::strstr(info->dlpi_name, search->library) == nullptr) return 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        if (info->dlpi_phdr[i].p_type != PT_DYNAMIC) continue;
        const Tables tables = tables_of(
            reinterpret_cast<const ElfW(Dyn)*>(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr));
        for (int list = 0; list < 2; ++list) {
            for (size_t k = 0; k < tables.sizes[list] / sizeof(ElfW(Rela)); ++k) {
                const ElfW(Rela) & entry = tables.lists[list][k];
                const auto& symbol = tables.symbols[ELF64_R_SYM(entry.r_info)];
                replace(info->dlpi_addr, entry, tables.strings + symbol.st_name, &search->replaced);
            }
        }
    }
    return 1;
}

}  // namespace

extern "C" {

// Call it through ctypes.PyDLL: then the caller keeps the GIL, busy, for so long.
void hold_busy(int64_t ns) {
    const int64_t end = now_ns() + ns;
    while (now_ns() < end) {
    }
}

int producer_start(uint64_t* word, int64_t layers, int64_t interval_ns, int64_t* stamps_ns) {
    producer = {word, layers, interval_ns, stamps_ns, {}};
    return pthread_create(&producer.thread, nullptr, produce, nullptr);
}

void producer_join() { pthread_join(producer.thread, nullptr); }

// Returns how many table entries of the loaded library were replaced; 0: it can't be watched this way.
int watch_gil(const char* library) {
    real_save = reinterpret_cast<SaveThread>(dlsym(RTLD_DEFAULT, "PyEval_SaveThread"));
    real_restore = reinterpret_cast<RestoreThread>(dlsym(RTLD_DEFAULT, "PyEval_RestoreThread"));
    if (real_save == nullptr || real_restore == nullptr) return 0;
    Search search{library, 0};
    dl_iterate_phdr(visit, &search);
    return search.replaced;
}

// The time that this thread has been without the GIL inside watched calls, since it was last asked.
int64_t take_released_ns() {
    const int64_t ns = released_ns;
    released_ns = 0;
    return ns;
}

}  // extern "C"
