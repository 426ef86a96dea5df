// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM_PRE_FAULT_MEMORY of more pages than a dirty ring has entries overruns the ring: pages
 * whose entries are overwritten stay writable, and writes to them are in no ring. KVM warns.
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

#ifndef KVM_PRE_FAULT_MEMORY
struct kvm_pre_fault_memory {
	__u64 gpa;
	__u64 size;
	__u64 flags;
	__u64 padding[5];
};
#define KVM_PRE_FAULT_MEMORY _IOWR(KVMIO, 0xd5, struct kvm_pre_fault_memory)
#endif

#define FAIL 1
#define SKIP 4
#define PAGE 4096UL
#define CODE 0x1000UL
#define BASE 0x40000000UL
#define SLOT 1
#define ENTRIES 1024
#define NPAGES (2 * ENTRIES)
#define WRITTEN 256

static int vm, vcpu, other;
static struct kvm_run *run;
static struct kvm_dirty_gfn *ring[2];

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

/* Hand all entries of a vCPU back to KVM; seen[] gets 1 for the pages that they name. */
static void harvest(int id, char *seen)
{
	struct kvm_dirty_gfn *entry;
	static unsigned int next[2];

	memset(seen, 0, NPAGES);
	while (ring[id][next[id] % ENTRIES].flags == KVM_DIRTY_GFN_F_DIRTY) {
		entry = &ring[id][next[id]++ % ENTRIES];
		if (entry->slot == SLOT && entry->offset < NPAGES)
			seen[entry->offset] = 1;
		entry->flags = KVM_DIRTY_GFN_F_RESET;
	}
	CALL(vm, KVM_RESET_DIRTY_RINGS, 0);
}

int main(void)
{
	struct kvm_pre_fault_memory range = { .gpa = BASE, .size = NPAGES * PAGE };
	const unsigned long size = ENTRIES * sizeof(struct kvm_dirty_gfn);
	void *mem = map(NPAGES * PAGE, -1, 0);
	char seen[NPAGES], *lost;

	create_vm(KVM_CAP_DIRTY_LOG_RING, size, "KVM_CAP_DIRTY_LOG_RING");
	ring[0] = map(size, vcpu, KVM_DIRTY_LOG_PAGE_OFFSET * PAGE);
	other = CALL(vm, KVM_CREATE_VCPU, 1);
	ring[1] = map(size, other, KVM_DIRTY_LOG_PAGE_OFFSET * PAGE);
	memset(mem, 1, NPAGES * PAGE);
	set_slot(SLOT, KVM_MEM_LOG_DIRTY_PAGES, BASE, NPAGES, mem);
	while (range.size) { /* a call may do a part only, and move the range on */
		CALL(other, KVM_PRE_FAULT_MEMORY, &range);
		harvest(1, seen);
	}
	guest_write(BASE, WRITTEN);
	harvest(0, seen);
	lost = memchr(seen, 0, WRITTEN);
	if (lost)
		errx(FAIL, "lost: page %td was written, and is in no ring", lost - seen);
	printf("all writes are reported\n");
	return 0;
}
