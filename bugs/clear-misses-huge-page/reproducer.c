// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM_CLEAR_DIRTY_LOG of two pages, the last of which is the first page of a huge
 * page, leaves that huge page writable: the next write to it is not reported.
 *
 * Exit status: 0 all writes are reported, 1 a write is lost, 4 cannot be tested here.
 */
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include <linux/kvm.h>

#define FAIL 1
#define SKIP 4
#define PAGE 4096UL
#define CODE 0x1000UL
#define HUGE (512 * PAGE)
#define BASE (0x40000000UL + PAGE)
#define SLOT 1
#define NPAGES 1023

static int vm, vcpu;
static struct kvm_run *run;

static int call(int fd, unsigned long request, unsigned long arg, const char *what)
{
	int ret = ioctl(fd, request, arg);

	if (ret < 0)
		err(SKIP, "cannot be tested here: %s", what);
	return ret;
}

#define CALL(fd, request, arg) call(fd, request, (unsigned long)(arg), #request)

static void *map(size_t size, int fd, off_t offset)
{
	int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
	void *mem = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, offset);

	if (mem == MAP_FAILED)
		err(SKIP, "cannot be tested here: mmap");
	return mem;
}

static void set_slot(int slot, int flags, unsigned long gpa, unsigned long npages, void *mem)
{
	struct kvm_userspace_memory_region region = {
		slot, flags, gpa, npages * PAGE, (unsigned long)mem,
	};

	CALL(vm, KVM_SET_USER_MEMORY_REGION, &region);
}

/* A VM with a capability, and a vCPU whose code stores to ecx pages from address eax on. */
static void create_vm(int cap, unsigned long arg, const char *name)
{
	/* 1: movb $1, (%eax); add $0x1000, %eax; loop 1b; hlt */
	static const char code[] = "\xc6\x00\x01\x05\x00\x10\x00\x00\xe2\xf6\xf4";
	struct kvm_segment flat = {
		.limit = -1, .selector = 8, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1,
	};
	struct kvm_enable_cap enable = { .cap = cap, .args = { arg } };
	int kvm = open("/dev/kvm", O_RDWR);
	struct kvm_sregs sregs;

	if (kvm < 0)
		err(SKIP, "cannot be tested here: /dev/kvm");
	vm = CALL(kvm, KVM_CREATE_VM, 0);
	call(vm, KVM_ENABLE_CAP, (unsigned long)&enable, name);
	set_slot(0, 0, CODE, 1, memcpy(map(PAGE, -1, 0), code, sizeof(code)));
	CALL(vm, KVM_SET_TSS_ADDR, 0xfffbd000);
	vcpu = CALL(vm, KVM_CREATE_VCPU, 0);
	run = map(CALL(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), vcpu, 0);
	CALL(vcpu, KVM_GET_SREGS, &sregs);
	sregs.cr0 |= 1; /* protected mode, without paging */
	sregs.ds = flat;
	flat.type = 11;
	sregs.cs = flat;
	CALL(vcpu, KVM_SET_SREGS, &sregs);
}

static void guest_write(unsigned long gpa, unsigned long npages)
{
	struct kvm_regs regs = { .rip = CODE, .rax = gpa, .rcx = npages, .rflags = 2 };

	CALL(vcpu, KVM_SET_REGS, &regs);
	CALL(vcpu, KVM_RUN, 0);
	if (run->exit_reason != KVM_EXIT_HLT)
		errx(SKIP, "cannot be tested here: KVM_RUN ends with exit %u", run->exit_reason);
}

/* Memory at a multiple of 2 MiB, in transparent huge pages. */
static char *map_huge(int nhuge)
{
	unsigned long area = (unsigned long)map((nhuge + 1) * HUGE, -1, 0), kib = 0;
	char *mem = (char *)((area + HUGE - 1) & -HUGE), line[128];
	FILE *file = fopen("/proc/self/smaps_rollup", "r");

	madvise(mem, nhuge * HUGE, MADV_HUGEPAGE);
	memset(mem, 1, nhuge * HUGE);
	while (file && fgets(line, sizeof(line), file))
		sscanf(line, "AnonHugePages: %lu", &kib);
	if (kib < nhuge * HUGE / 1024)
		errx(SKIP, "cannot be tested here: no transparent huge pages");
	return mem;
}

int main(void)
{
	/* The slot begins one page into a huge page, so that page 511 is the first of the next. */
	unsigned long bitmap[NPAGES / 64 + 1] = { 0 }, mask = 3UL << 62;
	struct kvm_clear_dirty_log clear = {
		.slot = SLOT, .first_page = 448, .num_pages = 64, .dirty_bitmap = &mask,
	};
	struct kvm_dirty_log log = { .slot = SLOT, .dirty_bitmap = bitmap };
	char *mem = map_huge(2) + PAGE;
	FILE *file;

	create_vm(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
		  KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET,
		  "KVM_DIRTY_LOG_INITIALLY_SET");
	set_slot(SLOT, 0, BASE, NPAGES, mem);
	guest_write(BASE + 600 * PAGE, 1);
	set_slot(SLOT, KVM_MEM_LOG_DIRTY_PAGES, BASE, NPAGES, mem);
	CALL(vm, KVM_CLEAR_DIRTY_LOG, &clear);
	guest_write(BASE + 511 * PAGE, 1);
	CALL(vm, KVM_GET_DIRTY_LOG, &log);
	if (!(bitmap[511 / 64] >> 511 % 64 & 1))
		errx(FAIL, "lost: page 511 was cleared, then written, and is not reported");
	/* With eager page splitting the huge page is gone before it could be missed. */
	file = fopen("/sys/module/kvm/parameters/eager_page_split", "r");
	if (file && fgetc(file) == 'Y')
		errx(SKIP, "cannot be tested here: kvm.eager_page_split=Y may hide it");
	printf("all writes are reported\n");
	return 0;
}
