# SPDX-License-Identifier: GPL-2.0-only
#
# Executes a list of operations in memory. Each entry is the address of a routine below and its three arguments. The host
# builds the lists from the routines' symbols (lib/dirty_tracking/scripted_vm.py).

	.include "guest.inc"

	.set OPERATION_SIZE, 32		# routine, %rdi, %rsi, %rdx
	.set CR4_OSXSAVE, 1 << 18
	.set CR4_VMXE, 1 << 13
	.set VMX_ALL_CONTEXTS, 2	# a type of INVEPT
	# Fields of the VMCS
	.set VM_EXIT_REASON, 0x4402
	.set HOST_RSP, 0x6c14
	.set HOST_RIP, 0x6c16

# The vCPU's block (%rdi) holds the address of its list. The list ends with do_sync.
	.globl guest_main
guest_main:
	mov %rdi, %r15
	mov (%r15), %rbx
next:
	mov (%rbx), %rax
	mov 8(%rbx), %rdi
	mov 16(%rbx), %rsi
	mov 24(%rbx), %rdx
	add $OPERATION_SIZE, %rbx
	call *%rax
	jmp next

# Calls the host, which may replace the list, and starts the list again.
	.globl do_sync
do_sync:
	ucall UCALL_SYNC
	mov (%r15), %rbx
	ret

# --- stores: address in %rdi, value in %rsi ---

	.macro operation name
	.globl do_\name
do_\name:
	.endm

	operation store_1
	mov %sil, (%rdi)
	ret
	operation store_2
	mov %si, (%rdi)
	ret
	operation store_4
	mov %esi, (%rdi)
	ret
	operation store_8
	mov %rsi, (%rdi)
	ret
	operation store_16		# the value is whatever %xmm0 holds
	movups %xmm0, (%rdi)
	ret
	operation store_32		# after enable_xsave
	vmovups %ymm0, (%rdi)
	ret
	operation store_64		# after enable_xsave
	vmovups %zmm0, (%rdi)
	ret
	operation store_nontemporal
	movnti %rsi, (%rdi)
	sfence
	ret
	operation store_nontemporal_16
	movntdq %xmm0, (%rdi)
	sfence
	ret

# --- implicit stores ---

	operation push
	mov %rsp, %rax
	lea 8(%rdi), %rsp
	push %rsi
	mov %rax, %rsp
	ret
	operation call
	mov %rsp, %rax
	lea 8(%rdi), %rsp
	call 1f
1:	mov %rax, %rsp
	ret
	operation rep_stosb		# %rdx bytes
	mov %rdx, %rcx
	mov %esi, %eax
	rep stosb
	ret
	operation rep_stosq		# %rdx words
	mov %rdx, %rcx
	mov %rsi, %rax
	rep stosq
	ret
	operation rep_stosq_down	# %rdx words, the last of them at %rdi
	mov %rdx, %rcx
	mov %rsi, %rax
	std
	rep stosq
	cld
	ret
	operation rep_movsq		# %rdx words from %rsi
	mov %rdx, %rcx
	rep movsq
	ret
	operation fxsave
	fxsave64 (%rdi)
	ret
	operation xsave			# after enable_xsave; the header and all enabled components
	mov $-1, %eax
	mov %eax, %edx
	xsave64 (%rdi)
	ret
	operation sgdt			# 10 bytes
	sgdt (%rdi)
	ret
	operation load_segment		# selector %rsi, after lgdt (%rdi)
	lgdt (%rdi)
	mov %esi, %fs
	ret
	operation interrupt		# its frame is pushed below %rdi
	mov %rsp, %rax
	mov %rdi, %rsp
	int $INTERRUPT_VECTOR
	mov %rax, %rsp
	ret

# --- read-modify-write ---

	operation add
	add %rsi, (%rdi)
	ret
	operation lock_add
	lock add %rsi, (%rdi)
	ret
	operation xchg
	xchg %rsi, (%rdi)
	ret
	operation bts
	lock bts %rsi, (%rdi)
	ret
	operation cmpxchg		# replaces %rdx by %rsi
	mov %rdx, %rax
	cmpxchg %rsi, (%rdi)
	ret
	operation lock_cmpxchg		# likewise
	mov %rdx, %rax
	lock cmpxchg %rsi, (%rdi)
	ret
	operation lock_cmpxchg16b	# likewise, with both upper halves 0
	mov %rbx, %r8
	mov %rdx, %rax
	xor %edx, %edx
	mov %rsi, %rbx
	xor %ecx, %ecx
	lock cmpxchg16b (%rdi)
	mov %r8, %rbx
	ret

# --- the same in KVM's instruction emulator; needs the module parameter kvm.force_emulation_prefix ---

	.macro emulated instruction:vararg
	ud2
	.ascii "kvm"
	\instruction
	.endm

	operation emulated_store_1
	emulated mov %sil, (%rdi)
	ret
	operation emulated_store_2
	emulated mov %si, (%rdi)
	ret
	operation emulated_store_4
	emulated mov %esi, (%rdi)
	ret
	operation emulated_store_8
	emulated mov %rsi, (%rdi)
	ret
	operation emulated_store_16
	emulated movups %xmm0, (%rdi)
	ret
	operation emulated_push
	mov %rsp, %rax
	lea 8(%rdi), %rsp
	emulated push %rsi
	mov %rax, %rsp
	ret
	operation emulated_add
	emulated add %rsi, (%rdi)
	ret
	operation emulated_lock_add
	emulated lock add %rsi, (%rdi)
	ret
	operation emulated_xchg
	emulated xchg %rsi, (%rdi)
	ret
	operation emulated_cmpxchg	# replaces %rdx by %rsi
	mov %rdx, %rax
	emulated cmpxchg %rsi, (%rdi)
	ret
	operation emulated_lock_cmpxchg	# likewise
	mov %rdx, %rax
	emulated lock cmpxchg %rsi, (%rdi)
	ret
	operation emulated_lock_cmpxchg_1
	mov %edx, %eax
	emulated lock cmpxchg %sil, (%rdi)
	ret
	operation emulated_lock_cmpxchg_2
	mov %edx, %eax
	emulated lock cmpxchg %si, (%rdi)
	ret
	operation emulated_lock_cmpxchg_4
	mov %edx, %eax
	emulated lock cmpxchg %esi, (%rdi)
	ret
	operation emulated_sgdt		# 10 bytes
	emulated sgdt (%rdi)
	ret
	operation emulated_load_segment	# selector %rsi, after lgdt (%rdi)
	lgdt (%rdi)
	emulated mov %esi, %fs
	ret
	operation emulated_load
	emulated mov (%rdi), %rax
	ret

# --- operations that do not write to the page ---

	operation load
	mov (%rdi), %rax
	ret
	operation rep_lodsb		# %rdx bytes
	mov %rdi, %rsi
	mov %rdx, %rcx
	rep lodsb
	ret
	operation prefetch
	prefetcht0 (%rdi)
	prefetchw (%rdi)
	ret
	operation clflush
	clflush (%rdi)
	ret
	operation execute		# the host has put a ret there
	call *%rdi
	ret
	operation test
	testq $1, (%rdi)
	ret
	operation store_nothing		# rep with a count of 0
	xor %ecx, %ecx
	xor %eax, %eax
	rep stosb
	ret

# --- CPU state ---

	operation wrmsr			# value %rsi to MSR %rdi
	mov %edi, %ecx
	mov %esi, %eax
	mov %rsi, %rdx
	shr $32, %rdx
	wrmsr
	ret
	operation invlpg
	invlpg (%rdi)
	ret
	operation write_cr0		# value %rdi
	mov %rdi, %cr0
	ret
	operation write_cr3		# likewise
	mov %rdi, %cr3
	ret
	operation enable_xsave		# with XCR0 = %rsi
	mov %cr4, %rax
	or $CR4_OSXSAVE, %rax
	mov %rax, %cr4
	xor %ecx, %ecx
	mov %esi, %eax
	xor %edx, %edx
	xsetbv
	ret
	operation take_interrupts	# delivers pending interrupts
	sti
	nop
	cli
	ret
	operation interruptible_load	# with interrupts enabled
	sti
	nop
	mov (%rdi), %rax
	cli
	ret
	operation hypercall		# number %rdi, arguments %rsi and %rdx; leaves the result in %r12
	mov %rbx, %r8
	mov %edi, %eax
	mov %rsi, %rbx
	mov %rdx, %rcx
	vmmcall				# KVM patches it to vmcall on Intel
	mov %r8, %rbx
	mov %rax, %r12
	ret

# --- a rendezvous with the host, without leaving the guest: publishes %rsi at (%rdx), waits until the host has written at
# least %rsi at 8(%rdx), then stores to (%rdi). While waiting it loads (%rdi), which keeps the translation in the TLB. There is
# no pause instruction, because KVM may intercept it.

	operation rendezvous_store
	mov %rsi, (%rdx)
1:	mov (%rdi), %rax
	cmp %rsi, 8(%rdx)
	jb 1b
	mov %rsi, (%rdi)
	ret

# --- a nested guest that executes operations as well ---

	operation vmrun			# %rdi = gpa of the VMCB, %rsi = the nested guest's block
	push %rbx
	push %r15
	mov %rdi, %rax
	mov %rsi, %rdi
	clgi
	vmrun %rax
	stgi
	pop %r15
	pop %rbx
	ret
	operation vmsave		# to gpa %rdi
	mov %rdi, %rax
	vmsave %rax
	ret
	operation vmload		# from gpa %rdi
	mov %rdi, %rax
	vmload %rax
	ret
	operation vmmcall		# ends the nested guest's list
	vmmcall

# The same with VMX. (%rdi) is the gpa of the VMCS, 8(%rdi) that of the VMXON region.
	.macro vmx instruction:vararg
	\instruction
	abort_if_not a, "\instruction failed"	# CF or ZF is set
	.endm

	operation vmxon
	mov %cr4, %rax
	or $CR4_VMXE, %rax
	mov %rax, %cr4
	vmx vmxon 8(%rdi)
	vmx vmclear (%rdi)
	ret
	operation vmlaunch		# with the fields and values from 24(%rdi) to a field 0; exit reason to 16(%rdi); %rsi as for vmrun
	push %rbx
	push %r15
	push %rdi
	vmx vmptrld (%rdi)
	add $24, %rdi
1:	mov (%rdi), %rax
	test %rax, %rax
	jz 2f
	vmx vmwrite 8(%rdi), %rax
	add $16, %rdi
	jmp 1b
2:	mov $HOST_RSP, %eax
	vmx vmwrite %rsp, %rax
	mov $HOST_RIP, %eax
	lea 3f(%rip), %rdx
	vmx vmwrite %rdx, %rax
	mov %rsi, %rdi
	vmx vmlaunch
3:	pop %rdi
	mov $VM_EXIT_REASON, %eax
	vmx vmread %rax, 16(%rdi)
	vmx vmclear (%rdi)		# writes the VMCS back to its page
	pop %r15
	pop %rbx
	ret
	operation invept		# of all nested page tables; %rdi points to 16 zeroed bytes
	mov $VMX_ALL_CONTEXTS, %eax
	vmx invept (%rdi), %rax
	ret
	operation vmcall		# ends the nested guest's list
	vmcall

# --- port I/O ---

	operation port_output		# a byte to port %rdi
	mov %edi, %edx
	out %al, %dx
	ret

	operation rep_insb		# %rdx bytes from port %rsi; KVM itself writes the data
	mov %rdx, %rcx
	mov %esi, %edx
	rep insb
	ret
