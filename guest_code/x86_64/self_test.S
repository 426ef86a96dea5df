# SPDX-License-Identifier: GPL-2.0-only
#
# An entry point for each event that the host library must handle: shared variables, calls, aborts, exceptions, shutdown.

	.include "guest.inc"

	.globl guest_main, aborts, page_fault, general_protection, lost_stack, triple_fault, unknown_call
	.globl question, answer

# Sets answer to question + 1 and syncs, until the host sets question to 0.
guest_main:
	mov question(%rip), %rcx
	test %rcx, %rcx
	jz 1f
	inc %rcx
	mov %rcx, answer(%rip)
	ucall UCALL_SYNC
	jmp guest_main
1:	ucall UCALL_DONE

aborts:
	mov $0x11, %edx
	mov $0x22, %ecx
	cmp %edx, %ecx
	abort_if_not ne, "not reached"
	abort_if_not e, "values differ"

page_fault:
	movq $1, 0x10			# page 0 is not mapped

general_protection:
	movabs $0x8000000000000000, %rax
	mov (%rax), %rax		# not canonical

lost_stack:
	xor %esp, %esp
	ud2

triple_fault:
	lidt no_idt(%rip)
	ud2

unknown_call:
	ucall 99

	.data
	.balign 8
question:
	.quad 0
answer:
	.quad 0
no_idt:
	.word 0
	.quad 0
