// A stand-in for libcuda.so.1: memory is host memory, work happens at once, every call is written
// down, and any call can be made to fail. Loaded before the first use of cuda.bindings, whose own
// marshalling therefore runs. Kernels do nothing unless a hook is set. Images must be registered,
// or (setting `cubins`) be real.
// Declarations follow cuda.h 13; only what the runtime calls is here.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

using u64 = unsigned long long;
enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, INVALID_IMAGE = 200, NO_CONTEXT = 201, BAD_HANDLE = 400 };
enum { NOT_FOUND = 500, ILLEGAL_ADDRESS = 700 };

struct Location { int type, id; };
struct AllocationProp { int type, handles; Location location; void* win; unsigned char flags[8]; };
struct AccessDesc { Location location; int flags; };
struct EdgeData { unsigned char from_port, to_port, type, reserved[5]; };
struct KernelParams {
    void* func;
    unsigned grid[3], block[3], shared;
    void **params, **extra;
    void *kern, *ctx;
};
struct NodeParams { int type, reserved0[3]; KernelParams kernel; };
struct Parameter { size_t offset, size; };
struct Image { std::string bytes; std::map<std::string, std::vector<Parameter>> entries; };
struct Kernel { std::string entry; std::vector<Parameter> params; };
struct Node { Kernel* kernel; std::vector<std::string> params; unsigned grid[3]; unsigned block; };
struct Graph { std::vector<Node*> nodes; };
struct Event { std::chrono::steady_clock::time_point at; bool recorded; };
using Hook = void (*)(const char* entry, void** params, const unsigned* grid);

static std::recursive_mutex lock;
static std::string text;
static std::map<std::string, u64> settings;
static std::map<std::string, std::pair<long, int>> failures;
static std::map<std::string, long> live;      // objects by kind
static std::map<char*, size_t> reserved;      // address space
static std::map<char*, size_t> usable;        // with memory and access
static std::map<u64, size_t> memory;          // by handle
static std::map<void*, std::string> objects;  // handle -> kind
static std::vector<Image> images;
static Hook hook;
static int fault;  // what every call returns once a kernel has faulted
static thread_local void* context;

static void defaults() {
    settings = {{"devices", 1}, {"capability", 90}, {"driver", 13000}, {"free", 64ull << 30},
                {"shared", 232448}, {"wishes", 1}, {"cubins", 0}, {"log", 1},
                {"hang_block", 0}, {"fault_block", 0}};
    for (auto& [name, value] : settings)  // a process that cannot call stub_set
        if (const char* given = getenv(("CUDA_STUB_" + name).c_str())) value = strtoull(given, 0, 10);
}

template <class... A>
static int enter(const char* name, bool needs_context, A... arguments) {
    if (settings.empty()) defaults();
    std::ostringstream line;
    line << name;
    ((line << ' ' << arguments), ...);
    if (settings["log"]) text += line.str() + '\n';
    if (fault) return fault;
    auto at = failures.find(name);
    if (at != failures.end() && --at->second.first == 0) return at->second.second;
    return needs_context && !context ? NO_CONTEXT : OK;
}
#define CALL(context_needed, ...)                                       \
    std::lock_guard<std::recursive_mutex> guard(lock);                  \
    if (int code = enter(__func__ __VA_OPT__(, context_needed, ) __VA_ARGS__)) return code

static void* make(const char* kind, void* object) {
    objects[object] = kind;
    live[kind]++;
    return object;
}
static bool is(const char* kind, void* object) {
    auto at = objects.find(object);
    return at != objects.end() && at->second == kind;
}
static int destroy(const char* kind, void* object) {
    if (!is(kind, object)) return BAD_HANDLE;
    objects.erase(object);
    live[kind]--;
    return OK;
}
static bool inside(const std::map<char*, size_t>& spans, u64 address, size_t size) {
    for (auto& [start, length] : spans)
        if ((char*)address >= start && (char*)address + size <= start + length) return true;
    return false;
}
static std::string hex(const void* data, size_t size) {
    std::string out;
    char two[3];
    for (size_t i = 0; i < size; i++) snprintf(two, 3, "%02x", ((const uint8_t*)data)[i]), out += two;
    return out.empty() ? "-" : out;
}

// Entries and parameters of a real cubin: the KPARAM_INFO notes (0x17) of its .nv.info.* sections.
template <class T>
static T get(const char* at) { T value; memcpy(&value, at, sizeof value); return value; }
static Image read_cubin(const char* elf) {
    Image image{"", {}};
    u64 table = get<u64>(elf + 0x28);
    auto width = get<uint16_t>(elf + 0x3A), count = get<uint16_t>(elf + 0x3C), names = get<uint16_t>(elf + 0x3E);
    auto section = [&](int i) { return elf + table + i * width; };
    const char* text = elf + get<u64>(section(names) + 24);
    for (int i = 0; i < count; i++) {
        std::string name = text + get<uint32_t>(section(i));
        if (name.rfind(".nv.info.", 0)) continue;
        const char *at = elf + get<u64>(section(i) + 24), *end = at + get<u64>(section(i) + 32);
        std::map<int, Parameter> found;
        while (at + 4 <= end) {
            auto form = at[0], attribute = at[1];
            auto size = get<uint16_t>(at + 2);
            at += 4;
            if (form != 4) continue;
            if (attribute == 0x17)
                found[get<uint16_t>(at + 4)] = {get<uint16_t>(at + 6), get<uint32_t>(at + 8) >> 18};
            at += size;
        }
        auto& params = image.entries[name.substr(9)];
        for (auto& [index, parameter] : found) params.push_back(parameter);
    }
    return image;
}

extern "C" {
// --- for tests
void stub_reset() {
    std::lock_guard<std::recursive_mutex> guard(lock);
    defaults();
    failures.clear(), text.clear(), images.clear(), hook = nullptr;
}
void stub_set(const char* name, u64 value) {
    if (settings.empty()) defaults();
    settings[name] = value;
}
void stub_fail(const char* name, long nth, int code) { failures[name] = {nth, code}; }
void stub_hook(Hook f) { hook = f; }
const char* stub_log() { return text.c_str(); }
long stub_live(const char* kind) {
    long all = 0;
    for (auto& [name, n] : live) all += !*kind || name == kind ? n : 0;
    return all;
}
// `table`: lines "entry offset,size offset,size ..."
void stub_image(const char* bytes, size_t size, const char* table) {
    Image image{std::string(bytes, size), {}};
    std::istringstream lines(table);
    for (std::string line; std::getline(lines, line);) {
        std::istringstream words(line);
        std::string entry, word;
        words >> entry;
        auto& params = image.entries[entry];
        while (words >> word) {
            size_t comma = word.find(',');
            params.push_back({std::stoul(word), std::stoul(word.substr(comma + 1))});
        }
    }
    images.push_back(image);
}

// --- the driver
int cuGetProcAddress_v2(const char* name, void** function, int, u64, int* status) {
    Dl_info self;
    dladdr((void*)cuGetProcAddress_v2, &self);
    static void* library = dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    *function = dlsym(library, strcmp(name, "cuGetProcAddress") ? name : "cuGetProcAddress_v2");
    if (status) *status = *function ? 0 : 1;
    return *function ? (int)OK : (int)NOT_FOUND;
}
int cuInit(unsigned flags) { CALL(false, flags); return OK; }
int cuDriverGetVersion(int* version) { CALL(false, ""); *version = settings["driver"]; return OK; }
int cuDeviceGetCount(int* count) { CALL(false, ""); *count = settings["devices"]; return OK; }
int cuDeviceGet(int* device, int index) { CALL(false, index); *device = index; return OK; }
int cuDeviceGetName(char* name, int size, int device) {
    CALL(false, device);
    snprintf(name, size, "Stub");
    return OK;
}
int cuDeviceGetAttribute(int* value, int kind, int device) {
    CALL(false, kind, device);
    switch (kind) {
        case 75: *value = settings["capability"] / 10; break;
        case 76: *value = settings["capability"] % 10; break;
        case 16: *value = 132; break;
        case 97: *value = settings["shared"]; break;
        case 38: *value = 50 << 20; break;
        default: return INVALID;
    }
    return OK;
}
int cuDevicePrimaryCtxRetain(void** out, int device) {
    CALL(false, device);
    static int the_context;
    live["context"]++;
    *out = &the_context;
    return OK;
}
int cuDevicePrimaryCtxRelease(int device) {
    CALL(false, device);
    live["context"]--;
    return OK;
}
int cuCtxSetCurrent(void* value) { CALL(false, value != nullptr); context = value; return OK; }
int cuMemGetInfo(size_t* free, size_t* total) {
    CALL(true, "");
    *free = settings["free"], *total = 80ull << 30;
    return OK;
}

int cuMemGetAllocationGranularity(size_t* unit, const AllocationProp* prop, int flags) {
    CALL(false, prop->type, prop->location.type, prop->location.id, flags);
    *unit = 2 << 20;
    return OK;
}
int cuMemAddressReserve(u64* address, size_t size, size_t alignment, u64 wish, u64 flags) {
    CALL(true, size, alignment, wish, flags);
    void* hint = settings["wishes"] ? (void*)wish : nullptr;
    size_t more = alignment ? alignment : 1;
    char* at = (char*)mmap(hint, size + more, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return OUT_OF_MEMORY;
    char* aligned = (char*)(((u64)at + more - 1) / more * more);
    if (aligned > at) munmap(at, aligned - at);
    munmap(aligned + size, at + more - aligned);
    reserved[aligned] = size;
    live["reservation"]++;
    *address = (u64)aligned;
    return OK;
}
int cuMemAddressFree(u64 address, size_t size) {
    CALL(true, size);
    auto at = reserved.find((char*)address);
    if (at == reserved.end() || at->second != size || usable.count((char*)address)) return INVALID;
    munmap((void*)address, size);
    reserved.erase(at);
    live["reservation"]--;
    return OK;
}
int cuMemCreate(u64* handle, size_t size, const AllocationProp* prop, u64 flags) {
    CALL(true, size, prop->type, prop->location.type, prop->location.id, flags);
    if (size > settings["free"]) return OUT_OF_MEMORY;
    static u64 next = 1;
    memory[*handle = next++] = size;
    live["memory"]++;
    return OK;
}
int cuMemRelease(u64 handle) {
    CALL(true, "");
    if (!memory.erase(handle)) return BAD_HANDLE;
    live["memory"]--;
    return OK;
}
int cuMemMap(u64 address, size_t size, size_t offset, u64 handle, u64 flags) {
    CALL(true, size, offset, flags);
    if (!memory.count(handle) || memory[handle] != size || !inside(reserved, address, size)) return INVALID;
    live["mapping"]++;
    return OK;
}
int cuMemUnmap(u64 address, size_t size) {
    CALL(true, size);
    if (!inside(reserved, address, size)) return INVALID;
    usable.erase((char*)address);
    live["mapping"]--;
    return OK;
}
int cuMemSetAccess(u64 address, size_t size, const AccessDesc* access, size_t count) {
    CALL(true, size, count, access->location.type, access->location.id, access->flags);
    mprotect((void*)address, size, PROT_READ | PROT_WRITE);
    memset((void*)address, 0xA5, size < 4096 ? size : 4096);  // memory of another process
    usable[(char*)address] = size;
    return OK;
}
int cuMemHostAlloc(void** out, size_t size, unsigned flags) {
    CALL(true, size, flags);
    *out = make("host", aligned_alloc(4096, (size + 4095) / 4096 * 4096));
    return OK;
}
int cuMemFreeHost(void* address) {
    CALL(true, "");
    int code = destroy("host", address);
    if (!code) free(address);
    return code;
}
static int copy(void* to, const void* from, size_t size, u64 device) {
    if (!inside(usable, device, size)) return INVALID;
    memcpy(to, from, size);
    return OK;
}
int cuMemcpyHtoDAsync(u64 to, const void* from, size_t size, void*) {
    CALL(true, to, size);
    return copy((void*)to, from, size, to);
}
int cuMemcpyHtoD(u64 to, const void* from, size_t size) {
    CALL(true, to, size);
    return copy((void*)to, from, size, to);
}
int cuMemcpyDtoH(void* to, u64 from, size_t size) {
    CALL(true, from, size);
    return copy(to, (void*)from, size, from);
}
int cuMemcpyDtoHAsync(void* to, u64 from, size_t size, void*) {
    CALL(true, from, size);
    return copy(to, (void*)from, size, from);
}
int cuMemsetD8Async(u64 to, unsigned char value, size_t size, void*) {
    CALL(true, to, (int)value, size);
    if (!inside(usable, to, size)) return INVALID;
    memset((void*)to, value, size);
    return OK;
}

int cuStreamCreate(void** out, unsigned flags) {
    CALL(true, flags);
    *out = make("stream", new int);
    return OK;
}
int cuStreamDestroy(void* stream) { CALL(true, ""); return destroy("stream", stream); }
int cuStreamSynchronize(void* stream) { CALL(true, ""); return is("stream", stream) ? OK : BAD_HANDLE; }
int cuEventCreate(void** out, unsigned flags) {
    CALL(true, flags);
    *out = make("event", new Event{});
    return OK;
}
int cuEventDestroy(void* event) { CALL(true, ""); return destroy("event", event); }
int cuEventRecord(void* event, void* stream) {
    CALL(true, "");
    if (!is("event", event) || !is("stream", stream)) return BAD_HANDLE;
    *(Event*)event = {std::chrono::steady_clock::now(), true};
    return OK;
}
int cuEventSynchronize(void* event) { CALL(true, ""); return is("event", event) ? OK : BAD_HANDLE; }
int cuEventElapsedTime(float* milliseconds, void* from, void* to) {
    CALL(true, "");
    if (!is("event", from) || !is("event", to) || !((Event*)from)->recorded) return BAD_HANDLE;
    std::chrono::duration<float, std::milli> time = ((Event*)to)->at - ((Event*)from)->at;
    *milliseconds = time.count();
    return OK;
}

int cuLibraryLoadData(void** out, const void* code, void*, void*, unsigned, void*, void*, unsigned) {
    CALL(true, "");
    for (auto& image : images)
        if (!memcmp(code, image.bytes.data(), image.bytes.size())) {
            *out = make("library", new Image(image));
            return OK;
        }
    if (settings["cubins"] && !memcmp(code, "\x7f" "ELF", 4)) {
        *out = make("library", new Image(read_cubin((const char*)code)));
        return OK;
    }
    return INVALID_IMAGE;
}
int cuLibraryUnload(void* library) { CALL(true, ""); return destroy("library", library); }
int cuLibraryGetKernel(void** out, void* library, const char* name) {
    CALL(true, name);
    if (!is("library", library)) return BAD_HANDLE;
    auto& entries = ((Image*)library)->entries;
    if (!entries.count(name)) return NOT_FOUND;
    *out = new Kernel{name, entries[name]};
    return OK;
}
int cuKernelGetFunction(void** out, void* kernel) { CALL(true, ""); *out = kernel; return OK; }
int cuFuncGetParamInfo(Kernel* kernel, size_t index, size_t* offset, size_t* size) {
    CALL(true, kernel->entry, index);
    if (index >= kernel->params.size()) return INVALID;
    *offset = kernel->params[index].offset, *size = kernel->params[index].size;
    return OK;
}
int cuFuncSetAttribute(Kernel* kernel, int attribute, int value) {
    CALL(true, kernel->entry, attribute, value);
    return OK;
}

int cuGraphCreate(void** out, unsigned flags) {
    CALL(true, flags);
    *out = make("graph", new Graph);
    return OK;
}
int cuGraphDestroy(void* graph) { CALL(true, ""); return destroy("graph", graph); }
// cuGraphAddNode entry grid block shared edge parameters; edge: none, or type:from_port:to_port of
// the one edge, "first" when the node before is not the one added last
int cuGraphAddNode(Node** out, Graph* graph, Node* const* before, const EdgeData* edges, size_t count, NodeParams* params) {
    const KernelParams& k = params->kernel;
    auto* kernel = (Kernel*)k.func;
    auto* node = new Node{kernel, {}, {k.grid[0], k.grid[1], k.grid[2]}, k.block[0]};
    std::ostringstream line;
    for (unsigned n : k.grid) line << n << ' ';
    for (unsigned n : k.block) line << n << ' ';
    line << k.shared;
    std::string edge = count ? "" : "none";
    for (size_t i = 0; i < count; i++) {
        char one[32] = "0:0:0";
        if (edges) snprintf(one, 32, "%d:%d:%d", edges[i].type, edges[i].from_port, edges[i].to_port);
        edge += before[i] == graph->nodes.back() ? one : "other";
    }
    std::string values;
    for (size_t i = 0; i < kernel->params.size(); i++) {
        node->params.emplace_back((char*)k.params[i], kernel->params[i].size);
        values += (i ? "," : "") + hex(k.params[i], kernel->params[i].size);
    }
    CALL(true, kernel->entry, line.str(), edge, values);
    if (!is("graph", graph) || params->type != 0 || k.extra || count > 1) return INVALID;
    graph->nodes.push_back(node);
    *out = node;
    return OK;
}
int cuGraphAddKernelNode(Node** out, Graph* graph, Node* const*, size_t, const KernelParams* params) {
    CALL(true, params->grid[0]);
    *out = new Node{(Kernel*)params->func, {}, {1, 1, 1}, params->block[0]};
    graph->nodes.push_back(*out);
    return OK;
}
int cuGraphExecKernelNodeSetParams(void* exec, Node* node, const KernelParams* params) {
    CALL(true, node->kernel->entry, params->grid[0]);
    return is("exec", exec) ? (int)OK : (int)BAD_HANDLE;
}
int cuGraphKernelNodeSetAttribute(Node* node, int kind, const unsigned* value) {
    CALL(true, node->kernel->entry, kind, value[0], value[1], value[2]);
    return OK;
}
int cuGraphInstantiate(void** out, Graph* graph, u64 flags) {
    CALL(true, graph->nodes.size(), flags);
    *out = make("exec", new Graph(*graph));
    return OK;
}
int cuGraphInstantiateWithFlags(void** out, Graph* graph, u64 flags) { return cuGraphInstantiate(out, graph, flags); }
int cuGraphExecDestroy(void* exec) { CALL(true, ""); return destroy("exec", exec); }
int cuGraphUpload(void* exec, void*) { CALL(true, ""); return is("exec", exec) ? OK : BAD_HANDLE; }
int cuGraphLaunch(Graph* exec, void*) {
    CALL(true, exec->nodes.size());
    if (!is("exec", exec)) return BAD_HANDLE;
    for (Node* node : exec->nodes) {
        // Kernels of as many threads hang or fault, if a test wants some to.
        while (node->block == settings["hang_block"]) sleep(1);
        if (node->block == settings["fault_block"]) return fault = ILLEGAL_ADDRESS;
        std::vector<void*> params;
        for (auto& value : node->params) params.push_back(value.data());
        if (hook) hook(node->kernel->entry.c_str(), params.data(), node->grid);
    }
    return OK;
}

// The map holds what it was made of: address, then shape, strides, box, type, swizzle as far as
// they fit.
int cuTensorMapEncodeTiled(u64* map, int type, unsigned rank, u64 address, const u64* dims, const u64* strides,
                           const unsigned* box, const unsigned* steps, int interleave, int swizzle, int l2, int fill) {
    std::ostringstream line;
    line << type << ' ' << rank << ' ' << address << ' ';
    for (unsigned i = 0; i < rank; i++) line << dims[i] << (i + 1 < rank ? "," : " ");
    for (unsigned i = 0; i + 1 < rank; i++) line << strides[i] << (i + 2 < rank ? "," : "");
    line << ' ';
    for (unsigned i = 0; i < rank; i++) line << box[i] << (i + 1 < rank ? "," : " ");
    for (unsigned i = 0; i < rank; i++) line << steps[i] << (i + 1 < rank ? "," : " ");
    line << interleave << ' ' << swizzle << ' ' << l2 << ' ' << fill;
    CALL(false, line.str());
    if ((u64)map % 64 || address % 16) return INVALID;
    memset(map, 0, 128);
    map[0] = address, map[1] = type, map[2] = rank, map[3] = swizzle;
    for (unsigned i = 0; i < rank; i++) map[4 + i] = dims[i], map[9 + i] = box[i];
    return OK;
}
}
